//! Standard output that may end early, and files that are complete or not there.

use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use crate::failure::{Failure, Result};

/// Why something could not be printed, if so.
static NOT_PRINTED: OnceLock<String> = OnceLock::new();

/// Prints to stdout. A reader that went away (`| head`) is no error; what else goes wrong, [`printed`] tells.
pub(crate) fn print(text: &str) {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            NOT_PRINTED.get_or_init(|| format!("stdout: {error}"));
        }
        _ => {}
    }
}

/// Whether all that was to be printed has been, as far as anybody read it.
pub(crate) fn printed() -> Result<()> {
    NOT_PRINTED.get().map_or(Ok(()), |why| Err(Failure::input(why)))
}

/// Says something on stderr, if anybody listens.
pub(crate) fn note(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// A place to write to that was looked at before any work began.
#[derive(Debug)]
pub(crate) struct OutputFile {
    shown: PathBuf,
    target: PathBuf,
    /// A pipe or device: written in place, since renaming over it would replace it.
    special: bool,
}

impl OutputFile {
    /// Checks that `path` can be a file, so that a typing error costs no computation.
    pub(crate) fn new(path: &Path) -> Result<Self> {
        let fail = |why: &str| Err(Failure::input(format!("{}: {why}", path.display())));
        // A link stays a link: what it points to is replaced.
        let target = path.canonicalize().unwrap_or_else(|_| path.to_path_buf());
        let (mut special, shown) = (false, path.to_path_buf());
        match std::fs::metadata(&target) {
            Ok(meta) if meta.is_dir() => return fail("is a directory"),
            Ok(meta) => special = !meta.is_file(),
            Err(_) if target.file_name().is_none() => return fail("is not a file name"),
            Err(_) if !directory(&target).is_dir() => return fail("the directory does not exist"),
            Err(_) => {}
        }
        Ok(Self { shown, target, special })
    }

    /// Its name if one of others is the same file.
    pub(crate) fn among(&self, others: &[&Self]) -> Option<std::path::Display<'_>> {
        let same = |other: &&Self| other.target == self.target && !self.special;
        others.iter().any(same).then(|| self.shown.display())
    }

    /// Writes the whole file, or leaves what was there.
    pub(crate) fn write(&self, bytes: &[u8]) -> Result<()> {
        self.try_write(bytes).map_err(|error| Failure::input(error).about(self.shown.display()))
    }

    fn try_write(&self, bytes: &[u8]) -> std::io::Result<()> {
        if self.special {
            return std::fs::OpenOptions::new().write(true).open(&self.target)?.write_all(bytes);
        }
        // In the same directory, so that the rename cannot cross file systems. Dropped, it is removed.
        let mut builder = tempfile::Builder::new();
        builder.prefix(".wgpu-attention-").suffix(".tmp");
        // Rights as for any new file; those of a file that is replaced are kept.
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            builder.permissions(std::fs::Permissions::from_mode(0o666));
        }
        let mut file = builder.tempfile_in(directory(&self.target))?;
        file.write_all(bytes)?;
        if let Ok(meta) = std::fs::metadata(&self.target) {
            file.as_file().set_permissions(meta.permissions())?;
        }
        file.persist(&self.target).map_err(|error| error.error)?;
        Ok(())
    }
}

fn directory(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Text in columns, as wide as their widest cell.
pub(crate) struct Table {
    head: Vec<&'static str>,
    /// `None` is an empty line.
    rows: Vec<Option<Vec<String>>>,
}

impl Table {
    /// Columns by name; a name that begins with `<` is that of a column aligned to the left.
    pub(crate) fn new(head: &[&'static str]) -> Self {
        Self { head: head.to_vec(), rows: Vec::new() }
    }

    /// One row, a cell for each column.
    pub(crate) fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(Some(cells.into_iter().collect()));
    }

    /// An empty line.
    pub(crate) fn gap(&mut self) {
        self.rows.push(None);
    }

    /// The whole table.
    pub(crate) fn render(&self) -> String {
        let names: Vec<String> = self.head.iter().map(|name| name.trim_start_matches('<').into()).collect();
        let width = |column: usize| {
            let cells = self.rows.iter().flatten().chain([&names]).filter_map(|row| row.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..self.head.len()).map(width).collect();
        let mut text = String::new();
        for row in [Some(&names)].into_iter().chain(self.rows.iter().map(Option::as_ref)) {
            let cells = row.into_iter().flatten().zip(&widths).zip(&self.head);
            let line: Vec<String> =
                cells
                    .map(|((cell, &width), head)| {
                        if head.starts_with('<') {
                            format!("{cell:width$}")
                        } else {
                            format!("{cell:>width$}")
                        }
                    })
                    .collect();
            text += line.join("  ").trim_end();
            text.push('\n');
        }
        text
    }
}
