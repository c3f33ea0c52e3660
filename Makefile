# The commands of this project. `make demo` and `make test` need root and nothing else: they
# install what they lack and say so. Everything that is built lies in target/.

PREFIX  ?= /usr/local
DESTDIR ?=
UNITDIR ?= $(PREFIX)/lib/systemd/system
CARGO   ?= cargo
# Rounds of the crash tests; `make test-full` runs what the suite promises.
HSM_ROUNDS_FULL ?= 100

TARGET   := $(if $(CARGO_TARGET_DIR),$(CARGO_TARGET_DIR),target)
RELEASE  := $(TARGET)/release
PROGRAMS := hsmd tierctl replay
MANUALS  := man/hsm-log.5 man/hsm-volume.5 man/hsm-policy.5 man/hsmd.toml.5 man/hsm.7
# Tools that setup.sh built, and the places where mkfs lies.
export PATH := $(CURDIR)/target/tools/bin:$(PATH):/usr/local/sbin:/usr/sbin:/sbin

.PHONY: man-text all build test test-full demo bench man install fmt lint doc clean distclean help

all: build

help:
	@echo 'make            release build of hsmd, tierctl and replay'
	@echo 'make demo       the main job on real files: watch, kill, destroy, rebuild, compare (root)'
	@echo 'make test       all tests and the documentation (root)'
	@echo 'make test-full  the same with $(HSM_ROUNDS_FULL) rounds of every crash test (hours)'
	@echo 'make bench      the table of measured figures (root; ROWS="adopt replay" selects)'
	@echo 'make man        man pages and completions into target/man and target/completions'
	@echo 'make install    programs, man pages, systemd unit, completions (DESTDIR= PREFIX=)'
	@echo 'make lint       what CI checks before the tests: rustfmt and clippy'

build:
	$(CARGO) build --release --locked -p hsmd -p replay --bins

test:
	tests/setup.sh test
	$(CARGO) build --workspace --locked --bins
	RUSTDOCFLAGS='-D warnings' $(CARGO) doc --workspace --locked --no-deps --quiet
	HSM_PYTHON=$$(tests/setup.sh python) HSM_BIN=$(abspath $(TARGET)/debug) \
	    $(CARGO) nextest run --workspace --locked

test-full:
	tests/setup.sh test
	$(CARGO) build --workspace --locked --release --bins
	HSM_ROUNDS=$(HSM_ROUNDS_FULL) HSM_FULL=1 \
	    HSM_PYTHON=$$(tests/setup.sh python) HSM_BIN=$(abspath $(RELEASE)) \
	    $(CARGO) nextest run --workspace --locked --release --profile full

demo:
	tests/setup.sh demo
	$(CARGO) build --release --locked -p hsmd -p replay --bins
	HSM_BIN=$(abspath $(RELEASE)) tests/demo/demo.sh

bench:
	tests/setup.sh bench
	$(CARGO) build --release --locked -p hsmd -p replay -p hsm-tests --bins
	HSM_BIN=$(abspath $(RELEASE)) tests/bench/bench.sh $(ROWS)

# The plain text of the formats' manuals, which every volume carries (needs mandoc).
man-text:
	for page in hsm-log.5 hsm-volume.5; do \
	    mandoc -T utf8 -O width=100 man/$$page | col -bx > man/text/$$page.txt || exit 1; done

doc:
	RUSTDOCFLAGS='-D warnings' $(CARGO) doc --workspace --locked --no-deps

fmt:
	$(CARGO) fmt --all

lint:
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --locked --all-targets -- -D warnings

man: build
	rm -rf $(TARGET)/man $(TARGET)/completions
	mkdir -p $(TARGET)/man $(TARGET)/completions
	for program in $(PROGRAMS); do \
	    $(RELEASE)/$$program generate-docs --man $(TARGET)/man --completions $(TARGET)/completions || exit 1; \
	done
	cp $(MANUALS) $(TARGET)/man/

install: man
	install -d $(DESTDIR)$(PREFIX)/sbin $(DESTDIR)$(PREFIX)/bin $(DESTDIR)$(UNITDIR)
	install -m 0755 $(RELEASE)/hsmd $(DESTDIR)$(PREFIX)/sbin/
	install -m 0755 $(RELEASE)/tierctl $(RELEASE)/replay $(DESTDIR)$(PREFIX)/bin/
	for section in 1 5 7 8; do \
	    install -d $(DESTDIR)$(PREFIX)/share/man/man$$section; \
	    for page in $(TARGET)/man/*.$$section; do \
	        [ ! -e "$$page" ] || install -m 0644 "$$page" $(DESTDIR)$(PREFIX)/share/man/man$$section/ || exit 1; \
	    done; \
	done
	sed 's|@sbindir@|$(PREFIX)/sbin|' hsmd/hsmd.service >$(TARGET)/hsmd.service
	install -m 0644 $(TARGET)/hsmd.service $(DESTDIR)$(UNITDIR)/
	install -d $(DESTDIR)$(PREFIX)/share/doc/hsmd/policies
	install -m 0644 policies/examples/*.toml $(DESTDIR)$(PREFIX)/share/doc/hsmd/policies/
	install -d $(DESTDIR)$(PREFIX)/share/bash-completion/completions \
	    $(DESTDIR)$(PREFIX)/share/zsh/site-functions $(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d
	for program in $(PROGRAMS); do \
	    install -m 0644 $(TARGET)/completions/$$program.bash $(DESTDIR)$(PREFIX)/share/bash-completion/completions/$$program && \
	    install -m 0644 $(TARGET)/completions/_$$program $(DESTDIR)$(PREFIX)/share/zsh/site-functions/ && \
	    install -m 0644 $(TARGET)/completions/$$program.fish $(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d/ || exit 1; \
	done

# Leaves target/tools and the benches' corpus, which take long to fetch.
clean:
	rm -rf $(TARGET)/debug $(TARGET)/release $(TARGET)/doc $(TARGET)/man $(TARGET)/completions $(TARGET)/hsmd.service
	rm -rf target/demo.* target/bench/work

distclean:
	rm -rf target
