//! One `.safetensors` file out of a tar, streamed: nothing else is ever unpacked.

use std::cell::Cell;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::path::{Component, Path};

use flate2::bufread::MultiGzDecoder;
use tar::{Archive, EntryType};

use super::{Error, MOST_BYTES, names_weights, peft};

const MOST_MEMBERS: usize = 4096;

/// Settings of PEFT that are kept until it is known which of them are the adapter's.
const MOST_CONFIGS: usize = 8;

/// Bytes that all headers of one member may take.
const MOST_HEAD: usize = 256 << 10;

/// How much larger than itself an archive may become. Weights hardly shrink.
const MOST_RATIO: u64 = 20;

/// Below this many bytes the ratio says nothing: captions and padding shrink well.
const RATIO_FROM: u64 = 16 << 20;

/// The member that was extracted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    pub name: String,
    pub bytes: u64,
    /// PEFT's `adapter_config.json` that lies beside it.
    pub config: Option<Vec<u8>>,
}

/// [`extract`] into a file, whose header gets the settings that lie beside the adapter.
pub fn extract_file(archive: impl Read, out: &mut File) -> Result<Member, Error> {
    let member = extract(archive, out)?;
    if let Some(config) = &member.config {
        peft::join(out, config).map_err(Error::Unpack)?;
    }
    Ok(member)
}

/// Copies the one `.safetensors` file of a tar or tar.gz to `out`.
///
/// Refused: none or several of them, links, absolute paths and paths that leave the archive, device files, bombs.
pub fn extract(archive: impl Read, out: &mut impl Write) -> Result<Member, Error> {
    let mut reader = BufReader::new(Counted { inner: archive, bytes: 0 });
    let gzip = reader.fill_buf().map_err(Error::Archive)?.starts_with(b"\x1f\x8b");
    if gzip { members(Inflated { inner: MultiGzDecoder::new(reader), bytes: 0 }, out) } else { members(reader, out) }
}

fn members(reader: impl Read, out: &mut impl Write) -> Result<Member, Error> {
    let head = Cell::new(None);
    let mut archive = Archive::new(Heads { inner: reader, left: &head });
    let mut found: Option<Member> = None;
    let mut configs: Vec<(String, Vec<u8>)> = Vec::new();
    let mut entries = archive.entries().map_err(unreadable)?;
    for i in 0.. {
        // Long names and attributes are read whole before anybody sees how long they are.
        head.set(Some(MOST_HEAD));
        let Some(entry) = entries.next() else { break };
        head.set(None);
        if i >= MOST_MEMBERS {
            return Err(Error::TooManyMembers(MOST_MEMBERS));
        }
        let mut entry = entry.map_err(unreadable)?;
        let path = entry.path().map_err(unreadable)?.into_owned();
        let name = path.to_string_lossy().into_owned();
        let bad = |what| Err(Error::BadMember { name: name.clone(), what });
        if !stays_inside(&path) {
            return bad("a path that leaves the archive");
        }
        match entry.header().entry_type() {
            EntryType::Regular | EntryType::Continuous => {}
            EntryType::Directory => continue,
            EntryType::XGlobalHeader => {
                skip(&mut entry)?;
                continue;
            }
            EntryType::Symlink | EntryType::Link => return bad("a link"),
            // A few bytes can state gigabytes of zeros, which weights never are.
            EntryType::GNUSparse => return bad("a sparse file"),
            _ => return bad("no plain file"),
        }
        if !names_weights(&name) {
            if peft::is_config(&name) && entry.size() <= peft::MOST_CONFIG && configs.len() < MOST_CONFIGS {
                let mut config = Vec::new();
                copy(&mut entry, &mut config)?;
                configs.push((name, config));
            }
            skip(&mut entry)?;
            continue;
        }
        if name.contains(char::is_control) {
            return bad("a name with control characters");
        }
        if let Some(first) = found {
            return Err(Error::SeveralMembers(first.name, name));
        }
        if entry.size() > MOST_BYTES {
            return Err(Error::TooLarge(MOST_BYTES));
        }
        let bytes = copy(&mut entry, out)?;
        found = Some(Member { name, bytes, config: None });
    }
    let mut found = found.ok_or(Error::NoMember)?;
    let wanted = peft::config_of(&found.name);
    found.config = configs.into_iter().find(|(name, _)| Some(name) == wanted.as_ref()).map(|(_, config)| config);
    Ok(found)
}

fn skip(entry: &mut impl Read) -> Result<(), Error> {
    copy(entry, &mut io::sink()).map(drop)
}

fn copy(from: &mut impl Read, to: &mut impl Write) -> Result<u64, Error> {
    let (mut buffer, mut bytes) = (vec![0; 1 << 16], 0);
    loop {
        match from.read(&mut buffer).map_err(unreadable)? {
            0 => return Ok(bytes),
            n => {
                to.write_all(&buffer[..n]).map_err(Error::Unpack)?;
                bytes += n as u64;
            }
        }
    }
}

fn stays_inside(path: &Path) -> bool {
    path.components().all(|part| matches!(part, Component::Normal(_) | Component::CurDir))
}

/// An error of the reader, or the bomb that it reports.
fn unreadable(error: io::Error) -> Error {
    if error.get_ref().is_some_and(|inner| inner.is::<Bomb>()) { Error::Bomb(MOST_RATIO) } else { Error::Archive(error) }
}

#[derive(Debug, thiserror::Error)]
#[error("too large when unpacked")]
struct Bomb;

/// Of what is read while `left` says so, so many bytes.
struct Heads<'a, R> {
    inner: R,
    left: &'a Cell<Option<usize>>,
}

impl<R: Read> Read for Heads<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let Some(left) = self.left.get() else { return self.inner.read(buffer) };
        if left == 0 {
            return Err(io::Error::other(format!("a member's name and attributes take more than {MOST_HEAD} bytes")));
        }
        let most = buffer.len().min(left);
        let n = self.inner.read(&mut buffer[..most])?;
        self.left.set(Some(left - n));
        Ok(n)
    }
}

/// Counts what goes through.
struct Counted<R> {
    inner: R,
    bytes: u64,
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buffer)?;
        self.bytes += n as u64;
        Ok(n)
    }
}

/// Holds what comes out against what went in.
struct Inflated<R> {
    inner: MultiGzDecoder<BufReader<Counted<R>>>,
    bytes: u64,
}

impl<R: Read> Read for Inflated<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buffer)?;
        self.bytes += n as u64;
        let packed = self.inner.get_ref().get_ref().bytes;
        if self.bytes > RATIO_FROM && self.bytes > packed * MOST_RATIO { Err(io::Error::other(Bomb)) } else { Ok(n) }
    }
}

#[cfg(test)]
mod tests {
    use flate2::Compression;
    use flate2::write::GzEncoder;
    use tar::{Builder, Header};

    use super::*;

    fn header(kind: EntryType, size: u64, name: &str) -> Header {
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_size(size);
        header.set_mode(0o644);
        // Not `set_path`, which refuses what these tests want.
        header.as_mut_bytes()[..name.len()].copy_from_slice(name.as_bytes());
        if kind == EntryType::GNUSparse {
            // A gigabyte of hole and no byte of content, as `tar --sparse` writes it.
            let gnu = header.as_gnu_mut().unwrap();
            gnu.set_real_size(1 << 30);
            gnu.sparse[0].offset.copy_from_slice(b"10000000000\0");
            gnu.sparse[0].numbytes.copy_from_slice(b"00000000000\0");
        }
        header.set_cksum();
        header
    }

    fn archive(members: &[(&str, EntryType, &[u8])]) -> Vec<u8> {
        let mut builder = Builder::new(Vec::new());
        for (name, kind, content) in members {
            builder.append(&header(*kind, content.len() as u64, name), *content).unwrap();
        }
        builder.into_inner().unwrap()
    }

    fn run(bytes: &[u8]) -> Result<(Member, Vec<u8>), Error> {
        let mut out = Vec::new();
        extract(bytes, &mut out).map(|member| (member, out))
    }

    const FILE: EntryType = EntryType::Regular;

    #[test]
    fn the_trainers_archive() {
        let bytes = archive(&[
            ("output/flux_train_replicate/config.yaml", FILE, b"a: 1"),
            ("output/flux_train_replicate/captions/1.txt", FILE, b"me"),
            ("output/flux_train_replicate/lora.safetensors", FILE, b"weights"),
        ]);
        let (member, content) = run(&bytes).unwrap();
        assert_eq!(
            (member.name.as_str(), member.bytes, content.as_slice()),
            ("output/flux_train_replicate/lora.safetensors", 7, &b"weights"[..])
        );

        // As macOS packs it: what it knows of each file lies beside it.
        let packed = [("me/._lora.safetensors", FILE, &b"Mac OS X"[..]), ("me/lora.safetensors", FILE, b"weights")];
        let (member, content) = run(&archive(&packed)).unwrap();
        assert_eq!((member.name.as_str(), content.as_slice()), ("me/lora.safetensors", &b"weights"[..]));

        let mut gzip = GzEncoder::new(Vec::new(), Compression::fast());
        gzip.write_all(&bytes).unwrap();
        assert_eq!(run(&gzip.finish().unwrap()).unwrap().1, b"weights");
    }

    #[test]
    fn hostile_archives_are_refused() {
        let is = |members: &[(&str, EntryType, &[u8])], part: &str| {
            let error = run(&archive(members)).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        };
        is(&[], "no .safetensors");
        is(&[("readme.txt", FILE, b"x")], "no .safetensors");
        is(&[("a.safetensors", FILE, b"x"), ("b/c.SAFETENSORS", FILE, b"y")], "more than one");
        is(&[("../a.safetensors", FILE, b"x")], "leaves the archive");
        is(&[("/etc/a.safetensors", FILE, b"x")], "leaves the archive");
        is(&[("a.safetensors", EntryType::Symlink, b"")], "a link");
        is(&[("x", EntryType::Link, b"")], "a link");
        is(&[("x", EntryType::Fifo, b"")], "no plain file");
        is(&[("x", EntryType::Char, b"")], "no plain file");
        is(&[("a.safetensors", EntryType::GNUSparse, b"")], "a sparse file");
        let many: Vec<_> = (0..=MOST_MEMBERS).map(|_| ("x.txt", FILE, &b""[..])).collect();
        is(&many, "4096 members");
        assert!(run(b"<!doctype html>").is_err());
        let good = archive(&[("a.safetensors", FILE, &[7; 2000])]);
        assert!(matches!(run(&good[..1000]).unwrap_err(), Error::Archive(_)));
    }

    /// Names and attributes are read whole by the library.
    #[test]
    fn a_member_with_an_endless_name_is_refused() {
        let name = vec![b'a'; MOST_HEAD + 1];
        for kind in [EntryType::GNULongName, EntryType::GNULongLink, EntryType::XHeader] {
            let error = run(&archive(&[("././@LongLink", kind, &name), ("a.safetensors", FILE, b"x")])).unwrap_err();
            let Error::Archive(why) = error else { panic!("{error}") };
            assert!(why.to_string().contains("name and attributes take more"), "{why}");
        }
        // Members before it may be as long as they like, and names as long as names are.
        let long = [&[b'd'; 300][..], b"/a.safetensors\0"].concat();
        let bytes = archive(&[("x.bin", FILE, &name), ("././@LongLink", EntryType::GNULongName, &long), ("a", FILE, b"weights")]);
        assert_eq!(run(&bytes).unwrap().1, b"weights");
        let error = run(&archive(&[("a\nb.safetensors", FILE, b"x")])).unwrap_err();
        assert!(error.to_string().contains("control characters"), "{error}");
    }

    #[test]
    fn a_bomb_is_stopped_while_it_grows() {
        let mut gzip = GzEncoder::new(Vec::new(), Compression::best());
        gzip.write_all(&header(FILE, 1 << 30, "a.safetensors").as_bytes()[..]).unwrap();
        let zeros = vec![0; 1 << 20];
        (0..64).for_each(|_| gzip.write_all(&zeros).unwrap());
        let error = run(&gzip.finish().unwrap()).unwrap_err();
        assert!(matches!(error, Error::Bomb(_)), "{error}");
        // The size that a header states is not believed either.
        let huge = header(FILE, MOST_BYTES + 1, "a.safetensors");
        assert!(matches!(run(huge.as_bytes()).unwrap_err(), Error::TooLarge(_)));
    }

    #[test]
    fn no_bytes_make_the_reader_fail() {
        let good = archive(&[("a.safetensors", FILE, b"weights"), ("b.txt", FILE, b"text")]);
        let mut random = fastrand::Rng::with_seed(11);
        for _ in 0..3000 {
            let mut bytes = good.clone();
            for _ in 0..random.usize(1..=8) {
                let at = random.usize(..bytes.len());
                bytes[at] = random.u8(..);
            }
            bytes.truncate(random.usize(1..=bytes.len()));
            let _ = run(&bytes);
        }
    }
}
