//! `tierctl log`: versions of a path, transactions, earlier content.

use std::path::Path;

use anyhow::{Context, bail};

use super::args::{Args, Moment};
use super::format::{Side, Table, add, name, size, some};
use super::{PROGRAM, connect, path_parameters};
use crate::control::base64;
use crate::control::client::Client;
use crate::control::methods::{ContentParameters, ReadParameters};
use crate::control::model::{Content, Transaction, Versions};
use crate::output::{self, Exit};

/// Bytes asked for at a time.
const PIECE_BYTES: u64 = 1 << 20;

pub(super) fn list(args: &Args, path: &Path) -> anyhow::Result<Exit> {
    let mut client = connect(args)?;
    let versions = match client.versions(&path_parameters(path)?) {
        Ok(versions) => versions,
        Err(error) if error.is_not_found() => {
            output::error(PROGRAM, &error);
            return Ok(Exit::No);
        }
        Err(error) => return Err(error.into()),
    };
    if args.json {
        output::json(&versions)?;
    } else {
        output::text(&render_list(&versions))?;
    }
    Ok(Exit::Done)
}

pub(super) fn render_list(versions: &Versions) -> String {
    let mut table = Table::new(
        0,
        &[
            ("LSN", Side::Right),
            ("TIME", Side::Left),
            ("SIZE", Side::Right),
            ("FILE", Side::Right),
            ("CHANGES", Side::Left),
        ],
    );
    for version in &versions.list {
        let fuzzy = if version.fuzzy { " (fuzzy)" } else { "" };
        table.row([
            version.lsn.to_string(),
            version.time.to_string(),
            version.size.map_or_else(|| "-".to_owned(), size),
            version.file.to_string(),
            format!("{}{fuzzy}", version.changes.join(", ")),
        ]);
    }
    let mut text = String::new();
    if versions.omitted > 0 {
        text = format!(
            "({} left out here)\n",
            some(versions.omitted, "older one is", "older ones are")
        );
    }
    text + &table.text()
}

pub(super) fn show(args: &Args, lsn: u64) -> anyhow::Result<Exit> {
    let transaction = match connect(args)?.transaction(lsn) {
        Ok(transaction) => transaction,
        Err(error) if error.is_not_found() => {
            output::error(PROGRAM, &error);
            return Ok(Exit::No);
        }
        Err(error) => return Err(error.into()),
    };
    if args.json {
        output::json(&transaction)?;
    } else {
        output::text(&render_transaction(&transaction))?;
    }
    Ok(Exit::Done)
}

pub(super) fn render_transaction(transaction: &Transaction) -> String {
    let mut text = format!(
        "LSN {} of {} (wall clock {})\nin segment {}, the commit's frame at byte {}; {}\n",
        transaction.lsn,
        transaction.time,
        transaction.wall,
        transaction.segment,
        transaction.frame_offset,
        some(transaction.operations_total, "operation", "operations")
    );
    for operation in &transaction.operations {
        let mut words = vec![format!("{:<10}", operation.kind)];
        if let Some(parent) = operation.parent {
            let entry = operation.name.as_deref().unwrap_or_default();
            words.push(format!("{parent}/{}", name(entry)));
        }
        if let Some(file) = operation.file {
            words.push(format!("file {file}"));
        }
        if !operation.text.is_empty() {
            words.push(name(&operation.text));
        }
        add!(text, "  {}\n", words.join(" ").trim_end());
    }
    let shown = transaction.operations.len() as u64;
    if shown < transaction.operations_total {
        add!(text, "  ({} more)\n", transaction.operations_total - shown);
    }
    text
}

pub(super) fn cat(args: &Args, path: &Path, at: Option<Moment>) -> anyhow::Result<Exit> {
    let mut client = connect(args)?;
    let asked = ContentParameters {
        path: path_parameters(path)?,
        lsn: match at {
            Some(Moment::Lsn(lsn)) => Some(lsn),
            _ => None,
        },
        time: match at {
            Some(Moment::Time(time)) => Some(time),
            _ => None,
        },
    };
    let content = match client.content(&asked) {
        Ok(content) => content,
        Err(error) if error.is_not_found() => {
            output::error(PROGRAM, &error);
            return Ok(Exit::No);
        }
        Err(error) => return Err(error.into()),
    };
    if args.json {
        // The content itself is no JSON; this says which version it would be.
        output::json(&content)?;
        return Ok(Exit::Done);
    }
    if content.fuzzy {
        output::note(
            PROGRAM,
            &format_args!(
                "{} was being changed while this version was read: it may mix moments",
                path.display()
            ),
        );
    }
    copy(&mut client, path, &content)?;
    Ok(Exit::Done)
}

fn copy(client: &mut Client, path: &Path, content: &Content) -> anyhow::Result<()> {
    let mut offset = 0;
    while offset < content.size {
        let asked = ReadParameters {
            file: content.file,
            lsn: content.lsn,
            offset,
            bytes_max: PIECE_BYTES,
        };
        let piece = client.read(asked).with_context(|| {
            format!(
                "{} is incomplete: {offset} of {} bytes were written",
                path.display(),
                content.size
            )
        })?;
        match (piece.data, piece.zeros) {
            (Some(data), _) => {
                let bytes = base64::decode(&data).context("hsmd sent a piece that is no base64")?;
                if bytes.is_empty() {
                    bail!(
                        "hsmd sent an empty piece at byte {offset} of {}",
                        content.size
                    );
                }
                output::bytes(&bytes)?;
                offset += bytes.len() as u64;
            }
            (None, Some(zeros)) if zeros > 0 => {
                output::zeros(zeros)?;
                offset = offset.saturating_add(zeros);
            }
            _ => bail!(
                "{} ends at byte {offset}, {} were expected",
                path.display(),
                content.size
            ),
        }
    }
    Ok(())
}
