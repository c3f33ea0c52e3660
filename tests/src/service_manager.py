"""Stands in for a service manager with a descriptor store (sd_pid_notify_with_fds(3)).

Starts a daemon, keeps the descriptors that it gives away, and starts it again with them after it was
killed, with all that it has left behind (KillMode=mixed). SIGUSR1 kills the daemon with all its processes;
SIGTERM stops it. While there is a file `notify.pause`, it is not started again. The words in the file
`notify.trap`, where there is one, go before the command once.
"""

import array
import fcntl
import os
import signal
import socket
import sys
import time

FIRST = 3
PAUSE_S = 1.0


def start(command: list[str], path: str, store: dict[str, int]) -> int:
    """Starts the daemon as a service manager would; gives its process."""
    pid = os.fork()
    if pid:
        return pid
    os.setsid()
    trap = f"{path}.trap"
    if os.path.exists(trap):
        with open(trap, encoding="utf-8") as words:
            command = words.read().splitlines() + command
        os.unlink(trap)
    environment = dict(os.environ, NOTIFY_SOCKET=path)
    if store:
        for number, fd in enumerate(store.values()):
            os.dup2(fd, FIRST + number, inheritable=True)
        environment.update(
            LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(store)), LISTEN_FDNAMES=":".join(store)
        )
    os.execvpe(command[0], command, environment)


def hear(sock: socket.socket, store: dict[str, int]) -> bool:
    """Takes one message, if there is one."""
    size = array.array("i").itemsize
    try:
        text, ancillary, _, _ = sock.recvmsg(4096, socket.CMSG_SPACE(16 * size))
    except TimeoutError:
        return False
    fds = array.array("i")
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(data[: len(data) - len(data) % size])
    said = dict(line.split("=", 1) for line in text.decode().splitlines() if "=" in line)
    name = said.get("FDNAME", "stored")
    if said.get("FDSTOREREMOVE") == "1" and name in store:
        os.close(store.pop(name))
    for fd in fds:
        if said.get("FDSTORE") == "1" and name not in store:
            # Out of the way of those that a child is given.
            store[name] = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 100)
        os.close(fd)
    return True


def main() -> int:
    path, command = sys.argv[1], sys.argv[2:]
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sock.bind(path)
    sock.settimeout(0.05)
    store: dict[str, int] = {}
    pid = start(command, path, store)
    signal.signal(signal.SIGUSR1, lambda *_: os.killpg(pid, signal.SIGKILL))
    signal.signal(signal.SIGTERM, lambda *_: os.kill(pid, signal.SIGTERM))
    while True:
        hear(sock, store)
        ended, status = os.waitpid(pid, os.WNOHANG)
        if not ended:
            continue
        # Whatever it said before its end counts (systemd looks at messages before dead children).
        while hear(sock, store):
            pass
        try:
            os.killpg(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        code = os.waitstatus_to_exitcode(status)
        if code >= 0:
            # The permission group first: closing the other one waits for every access.
            for name in sorted(store, reverse=True):
                os.close(store[name])
            return code
        time.sleep(PAUSE_S)
        while os.path.exists(f"{path}.pause"):
            time.sleep(0.01)
        pid = start(command, path, store)


if __name__ == "__main__":
    sys.exit(main())
