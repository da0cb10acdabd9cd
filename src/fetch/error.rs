use std::path::PathBuf;

/// Why a file could not be had.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{path} cannot be read")]
    Read {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("{0} is not fetched by this version; download the file and give its path")]
    NotFetched(&'static str),
    #[error("the reference is empty; give a file's path")]
    Empty,
    #[error("the archive is damaged or not a tar: {0}")]
    Archive(std::io::Error),
    #[error("the archive holds no .safetensors file")]
    NoMember,
    #[error("the archive holds more than one .safetensors file: {0} and {1}; extract the one that is meant")]
    SeveralMembers(String, String),
    #[error("the archive's member {name:?} is {what}, which is not followed")]
    BadMember { name: String, what: &'static str },
    #[error("the archive has more than {0} members")]
    TooManyMembers(usize),
    #[error("the archive's file is larger than {0} bytes")]
    TooLarge(u64),
    #[error("the archive grows to more than {0} times its size when unpacked")]
    Bomb(u64),
    #[error("the extracted file cannot be written")]
    Write(#[source] std::io::Error),
}
