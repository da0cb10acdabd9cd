use std::io;
use std::path::PathBuf;

use crate::bytes;

/// Why a file could not be had. Nothing of a link's query, of tokens or of addresses is in the texts.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{path} cannot be read")]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("the reference is empty; {FORMS}")]
    Empty,
    #[error("{0:?} is no reference to a file; {FORMS}")]
    Unknown(String),
    #[error("{0:?} cannot be fetched for a request; give an https link, owner/repo on Hugging Face, civitai:ID, or a data URI")]
    NotRemote(String),

    #[error("the archive is damaged or not a tar: {0}")]
    Archive(io::Error),
    #[error("the archive holds no .safetensors file")]
    NoMember,
    #[error("the archive holds more than one .safetensors file: {0} and {1}; extract the one that is meant")]
    SeveralMembers(String, String),
    #[error("the archive's member {name:?} is {what}, which is not followed")]
    BadMember { name: String, what: &'static str },
    #[error("the archive has more than {0} members")]
    TooManyMembers(usize),
    #[error("the extracted file cannot be written")]
    Unpack(#[source] io::Error),
    #[error("the archive grows to more than {0} times its size when unpacked")]
    Bomb(u64),

    #[error("the file is larger than {}, which no LoRA of FLUX.1 is", bytes::in_words(*.0))]
    TooLarge(u64),
    #[error("the picture is larger than {} MiB", .0 >> 20)]
    PictureTooLarge(usize),
    #[error("it is {0}, not a safetensors file")]
    Foreign(&'static str),
    #[error("the data URI {0}")]
    Data(&'static str),

    #[error(
        "the link {url} is not allowed: {why}; links are https to the public internet (DARKROOM_PRIVATE_URLS=1 opens one's own network)"
    )]
    NotAllowed { url: String, why: &'static str },
    #[error("{what} wants permission; {hint}")]
    Unauthorized { what: String, hint: String },
    #[error("{what} was not found; {hint}")]
    NotFound { what: String, hint: String },
    #[error("the repository {repo} holds no .safetensors file")]
    NoFile { repo: String },
    #[error("the repository {repo} holds several .safetensors files; name one of them: {}", .files.join(", "))]
    SeveralFiles { repo: String, files: Vec<String> },
    #[error("the folder {folder} holds no .safetensors file; it holds {}", some(.files))]
    NoFileInFolder { folder: PathBuf, files: Vec<String> },
    #[error("the folder {folder} holds several .safetensors files; name one of them: {}", some(.files))]
    SeveralInFolder { folder: PathBuf, files: Vec<String> },
    #[error("{0} leads through more than {limit} redirects", limit = super::client::MOST_HOPS)]
    Redirects(String),
    #[error("{0} cannot be reached; check the name and the network")]
    Unreachable(String),
    #[error("{0} has no valid certificate")]
    Certificate(String),
    #[error("the connection to {0} broke off")]
    Broken(String),
    #[error("{host} sent nothing for {seconds} s")]
    Stalled { host: String, seconds: u64 },
    #[error("{0} takes too long to come; try again, or put the file where it is faster")]
    Slow(String),
    #[error("{host} answered with status {status}; try again later")]
    Status { host: String, status: u16 },
    #[error("{0} sends the file compressed, which weights never are")]
    Encoded(String),
    #[error("{0} gives a web page, perhaps to log in, not a file; copy the link of the download itself")]
    WebPage(String),
    #[error("what arrived from {0} is not what was announced (its size or SHA-256 differs)")]
    Altered(String),
    #[error("{0} is not in the cache, and HF_HUB_OFFLINE forbids to fetch it")]
    Offline(String),
    #[error("the answer of {0} is not understood")]
    Answer(String),
    #[error("the object store refuses {what}: {why}")]
    Store { what: String, why: String },

    #[error("{} are needed on the disk of {folder}, {} are free; make room, or set XDG_CACHE_HOME", bytes::in_words(*.need), bytes::in_words(*.have))]
    DiskFull { folder: PathBuf, need: u64, have: u64 },
    #[error("there is no folder for the cache; set XDG_CACHE_HOME")]
    NoCache,
    #[error("{path} cannot be written")]
    Write {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("the download was stopped")]
    Cancelled,
    #[error("the client cannot be made")]
    Client(#[source] reqwest::Error),
    /// A fault of this process, not of a file or the network.
    #[error("{0}")]
    Own(&'static str, #[source] io::Error),
    #[error("the tokens of this request cannot be read with this data folder's `secret`; send the request again")]
    Tokens,
}

const FORMS: &str = "give a file's path, an https link, owner/repo on Hugging Face, civitai:ID, or s3://bucket/key";

/// The names of a folder's files, as many as one reads.
fn some(names: &[String]) -> String {
    const SHOWN: usize = 12;
    match names.len() {
        0 => "nothing".into(),
        n if n > SHOWN => format!("{} and {} more", names[..SHOWN].join(", "), n - SHOWN),
        _ => names.join(", "),
    }
}

impl Error {
    /// A stable name for programs.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Read { .. } => "unreadable",
            Self::Empty | Self::Unknown(_) | Self::NotRemote(_) => "bad_reference",
            Self::Archive(_) | Self::NoMember | Self::SeveralMembers(..) => "archive_invalid",
            Self::BadMember { .. } | Self::TooManyMembers(_) | Self::Bomb(_) => "archive_unsafe",
            Self::TooLarge(_) | Self::PictureTooLarge(_) => "too_large",
            Self::Foreign(_) | Self::WebPage(_) => "not_safetensors",
            Self::Data(_) => "bad_data_uri",
            Self::NotAllowed { .. } => "url_not_allowed",
            Self::Unauthorized { .. } => "unauthorized",
            Self::NotFound { .. } => "not_found",
            Self::NoFile { .. } | Self::SeveralFiles { .. } | Self::NoFileInFolder { .. } | Self::SeveralInFolder { .. } => {
                "ambiguous"
            }
            Self::Redirects(_) => "too_many_redirects",
            Self::Certificate(_) => "tls_error",
            Self::Unreachable(_) | Self::Broken(_) | Self::Stalled { .. } | Self::Status { .. } => "unreachable",
            Self::Slow(_) => "too_slow",
            Self::Encoded(_) | Self::Answer(_) | Self::Altered(_) => "bad_answer",
            Self::Offline(_) => "offline",
            Self::Store { .. } => "store_error",
            Self::DiskFull { .. } => "storage_full",
            Self::Cancelled => "cancelled",
            Self::Tokens => "tokens_unreadable",
            Self::NoCache | Self::Write { .. } | Self::Unpack(_) | Self::Client(_) | Self::Own(..) => "failed",
        }
    }

    /// Whether the other side may well do it in a moment.
    pub(super) fn is_passing(&self) -> bool {
        matches!(self, Self::Unreachable(_) | Self::Broken(_) | Self::Stalled { .. } | Self::Status { .. })
    }

    pub(super) fn write(path: &std::path::Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        |source| Self::Write { path, source }
    }
}
