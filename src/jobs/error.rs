/// Why the store did not do it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("this tenant has {0} jobs waiting, as many as it may")]
    TenantFull(i64),
    #[error("{0} jobs are waiting, as many as there may")]
    Full(i64),
    #[error("the files of this tenant would take more than the {0} bytes that they may")]
    FilesFull(i64),
    #[error("this tenant has {0} models, as many as it may")]
    ModelsFull(i64),
    #[error("the idempotency key was used for another request")]
    Conflict,
    #[error("another worker has the job now")]
    Lost,
    #[error("{0:?} is no database; give sqlite:PATH or postgres://...")]
    Address(String),
    #[error("the database was written by a newer version (schema {found}, this one knows {known})")]
    Newer { found: i64, known: i64 },
    #[error("the database holds something unexpected in {0}")]
    Damaged(&'static str),
    #[error("the system has no random numbers")]
    Random,
    /// As [`Self::Database`], told to all who shared the commit.
    #[error("the database fails: {0}")]
    Failed(std::sync::Arc<str>),
    #[error("the database fails")]
    Database(#[from] sqlx::Error),
}

impl Error {
    /// Whether the database itself fails: what was asked may be asked again.
    pub(crate) fn is_outage(&self) -> bool {
        matches!(self, Self::Database(_) | Self::Failed(_))
    }
}
