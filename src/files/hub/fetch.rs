//! One file from the hub into the cache: goes on where an earlier download stopped, and shows the file in the cache
//! only when all its bytes are there and their SHA-256 is the announced one.
//!
//! Ours, because hf-hub 0.5 appends whatever the server sends to an interrupted file and compares no hash.
//! What a stream is made of is known in `remote`.

use std::{
    fmt::Write as _,
    fs::{self, File},
    io::{self, Read, Seek, Write as _},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Error, Result, anyhow, bail};
use indicatif::ProgressBar;
use sha2::{Digest, Sha256};

use super::{
    cache::Cache,
    failure,
    remote::{Head, Opened, Remote},
};
use crate::{files::space::free_space, ui::Reporter};

/// The longest pause between two attempts.
const PAUSE: Duration = Duration::from_secs(5);
/// Bytes of the largest file whose size is not announced.
const MAX_UNSIZED: u64 = 64 << 20;
/// Bytes that are read at once.
const BUFFER: usize = 1 << 20;

/// The file `path` of `commit`, downloaded unless its bytes are in the cache already. `name` is for messages, `listed`
/// the size that the repository's listing says, if it does.
pub(super) fn fetch(
    remote: &Remote,
    cache: &Cache,
    commit: &str,
    path: &str,
    name: &str,
    listed: Option<u64>,
    reporter: &Reporter,
) -> Result<PathBuf> {
    let head = remote.head(commit, path)?;
    let blob = cache.blob(&head.etag)?;
    let Some(size) = head.size else {
        return unsized_file(remote, cache, commit, path, name, listed, &head);
    };
    let waiting = reporter.download(name, size, 0);
    let _lock = cache.lock(&head.etag, || {
        waiting.set_message(format!("waiting for another process: {name}"));
        waiting.tick();
    })?;
    waiting.finish_and_clear();
    let etag = head.etag.clone();
    if !fs::metadata(&blob).is_ok_and(|m| m.len() == size) {
        let download = Download {
            remote,
            commit,
            path,
            name,
            head,
            size,
            reporter,
            folder: blob.parent().unwrap_or(&blob),
        };
        // a part that an earlier run left may be damaged: then once more from the beginning
        if !download.run(&blob)? && !download.run(&blob)? {
            bail!(
                "the bytes of `{name}` are not those that the hub announced (SHA-256)\nhint: run the same command again; if it stays so, a proxy or mirror changes the file"
            );
        }
    }
    cache.link(commit, path, &etag)
}

/// A file whose size the server does not say, as it compresses its answers: small, and fetched in one go.
fn unsized_file(
    remote: &Remote,
    cache: &Cache,
    commit: &str,
    path: &str,
    name: &str,
    listed: Option<u64>,
    head: &Head,
) -> Result<PathBuf> {
    let blob = cache.blob(&head.etag)?;
    let _lock = cache.lock(&head.etag, || ())?;
    let is_whole = |len: u64| listed.is_none_or(|size| len == size);
    if !fs::metadata(&blob).is_ok_and(|m| m.is_file() && is_whole(m.len())) {
        let folder = blob.parent().unwrap_or(&blob);
        let (Opened::From(bytes) | Opened::Whole(bytes)) = remote.open(commit, path, head, 0)?
        else {
            bail!("the hub has no bytes of `{name}`");
        };
        let mut all = Vec::new();
        let read = bytes.take(MAX_UNSIZED + 1).read_to_end(&mut all);
        let len = all.len() as u64;
        read.map_err(|error| failure::cut_at_once(name, len, &error.into()))?;
        if len > MAX_UNSIZED {
            bail!(
                "the server does not say how large `{name}` is, and it is larger than {} MB\nhint: set HF_ENDPOINT to a mirror that does not compress weights",
                MAX_UNSIZED >> 20
            );
        }
        if !is_whole(len) {
            // where the end of the connection ends the file, nothing else tells
            let cause = anyhow!("the hub's listing says another size");
            return Err(failure::cut_at_once(name, len, &cause));
        }
        let write = || -> io::Result<()> {
            fs::create_dir_all(folder)?;
            let mut file = tempfile::NamedTempFile::new_in(folder)?;
            file.write_all(&all)?;
            file.as_file().sync_all()?;
            file.persist(&blob)?;
            Ok(())
        };
        write().map_err(|error| failure::unwritable(folder, &error))?;
    }
    cache.link(commit, path, &head.etag)
}

/// One file on its way.
struct Download<'a> {
    remote: &'a Remote,
    commit: &'a str,
    path: &'a str,
    name: &'a str,
    head: Head,
    /// In bytes.
    size: u64,
    reporter: &'a Reporter,
    /// Where the bytes go.
    folder: &'a Path,
}

/// Why a stream ended before the end of the file.
enum Stop {
    /// The connection: worth another try.
    Cut(Error),
    /// The disk.
    Disk(io::Error),
    /// A refusal.
    Refused(Error),
}

impl From<io::Error> for Stop {
    fn from(error: io::Error) -> Self {
        Self::Disk(error)
    }
}

impl Download<'_> {
    /// Brings all bytes to `blob`; false when they are not the announced ones, and nothing is left of them.
    fn run(&self, blob: &Path) -> Result<bool> {
        let fail = |error| self.disk(&error, 0);
        fs::create_dir_all(self.folder).map_err(fail)?;
        // our own name: other tools do not write their unfinished files in order, so theirs cannot be continued
        let unfinished = format!("{}.fastflux-part", self.head.etag);
        let unfinished = self.folder.join(unfinished);
        let mut part = Part::open(&unfinished, self.head.sha256.is_some()).map_err(fail)?;
        if part.len > self.size {
            part.clear().map_err(fail)?;
        }
        let missing = self.size - part.len;
        if let Some(free) = free_space(self.folder).filter(|free| *free < missing) {
            return Err(failure::full(self.name, missing, Some(free), self.folder));
        }

        let bar = self.reporter.download(self.name, self.size, part.len);
        let filled = self.fill(&mut part, &bar);
        bar.finish_and_clear();
        filled?;
        let fail = |error| self.disk(&error, 0);
        if part.is_intact(self.head.sha256.as_deref()) {
            part.finish(blob).map_err(fail)?;
            return Ok(true);
        }
        drop(part);
        fs::remove_file(&unfinished).map_err(fail)?;
        Ok(false)
    }

    /// Appends bytes until all are there, over as many connections as it takes.
    fn fill(&self, part: &mut Part, bar: &ProgressBar) -> Result<()> {
        let size = self.size;
        let mut pause = Duration::ZERO;
        let mut progress = Instant::now();
        while part.len < size {
            let before = part.len;
            match self.pump(part, bar) {
                Ok(()) => {}
                Err(Stop::Disk(error)) => return Err(self.disk(&error, size - part.len)),
                Err(Stop::Refused(error)) => return Err(error),
                Err(Stop::Cut(_)) if part.len > before => {
                    (pause, progress) = (Duration::ZERO, Instant::now());
                }
                Err(Stop::Cut(error)) => {
                    if progress.elapsed() > self.remote.patience() {
                        return Err(failure::cut(self.name, part.len, size, &error));
                    }
                    std::thread::sleep(pause);
                    pause = (2 * pause).clamp(Duration::from_millis(100), PAUSE);
                }
            }
        }
        Ok(())
    }

    /// Appends what one connection brings.
    fn pump(&self, part: &mut Part, bar: &ProgressBar) -> Result<(), Stop> {
        let opened = self
            .remote
            .open(self.commit, self.path, &self.head, part.len);
        let mut bytes = match opened {
            Ok(Opened::From(bytes)) => bytes,
            Ok(Opened::Whole(bytes)) => {
                part.clear()?;
                bytes
            }
            Ok(Opened::BeyondEnd) => {
                part.clear()?; // whatever it is, it is not the beginning of this file
                let error = anyhow!(
                    "the hub announced more bytes of `{}` than it has",
                    self.name
                );
                return Err(Stop::Refused(error));
            }
            Err(failure) if failure.transient => return Err(Stop::Cut(failure.error)),
            Err(failure) => return Err(Stop::Refused(failure.error)),
        };
        bar.set_position(part.len);
        let mut buffer = vec![0; BUFFER];
        loop {
            let chunk = match bytes.read(&mut buffer) {
                Ok(0) => break,
                Ok(n) => &buffer[..n],
                Err(error) => return Err(Stop::Cut(error.into())),
            };
            if part.len + chunk.len() as u64 > self.size {
                let error = anyhow!(
                    "the hub sends more bytes of `{}` than it announced",
                    self.name
                );
                return Err(Stop::Refused(error));
            }
            part.append(chunk)?;
            bar.set_position(part.len);
        }
        if part.len < self.size {
            return Err(Stop::Cut(anyhow!("the connection ended early")));
        }
        Ok(())
    }

    /// A failure to write, with `missing` bytes to go.
    fn disk(&self, error: &io::Error, missing: u64) -> Error {
        if failure::is_full(error) {
            return failure::full(self.name, missing, None, self.folder);
        }
        failure::unwritable(self.folder, error)
    }
}

/// An unfinished file: its first `len` bytes, in order.
struct Part {
    path: PathBuf,
    file: File,
    len: u64,
    hash: Option<Sha256>,
}

impl Part {
    /// What an earlier download left, or an empty file.
    fn open(path: &Path, hashed: bool) -> io::Result<Self> {
        let mut file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)?;
        let mut hash = hashed.then(Sha256::new);
        let mut len = 0;
        match &mut hash {
            Some(hash) => {
                let mut buffer = vec![0; BUFFER];
                loop {
                    let n = file.read(&mut buffer)?;
                    if n == 0 {
                        break;
                    }
                    hash.update(&buffer[..n]);
                    len += n as u64;
                }
            }
            None => len = file.seek(io::SeekFrom::End(0))?,
        }
        Ok(Self {
            path: path.to_owned(),
            file,
            len,
            hash,
        })
    }

    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        if let Err(error) = self.file.write_all(bytes) {
            // a write may succeed in part: back to what is known
            self.file.set_len(self.len)?;
            self.file.seek(io::SeekFrom::Start(self.len))?;
            return Err(error);
        }
        if let Some(hash) = &mut self.hash {
            hash.update(bytes);
        }
        self.len += bytes.len() as u64;
        Ok(())
    }

    fn clear(&mut self) -> io::Result<()> {
        self.file.set_len(0)?;
        self.file.rewind()?;
        self.len = 0;
        self.hash = self.hash.as_ref().map(|_| Sha256::new());
        Ok(())
    }

    /// Whether the bytes are the announced ones, as far as that is known.
    fn is_intact(&mut self, sha256: Option<&str>) -> bool {
        let (Some(wanted), Some(hash)) = (sha256, self.hash.take()) else {
            return true;
        };
        let found = hash.finalize().iter().fold(String::new(), |mut hex, byte| {
            let _ = write!(hex, "{byte:02x}");
            hex
        });
        found == wanted
    }

    fn finish(self, blob: &Path) -> io::Result<()> {
        self.file.sync_all()?; // a crash must not leave a full name on an empty file
        fs::rename(&self.path, blob)
    }
}
