//! Bringing a database to the schema of this version: forward only, and a SQLite file is copied first.

use std::io::ErrorKind;
use std::path::Path;

use sqlx::{AnyPool, Executor, Row};

use super::Error;
use super::store::Dialect;

/// In order; the number is the position from 1.
const MIGRATIONS: &[&str] = &[
    include_str!("migrations/0001_jobs.sql"),
    include_str!("migrations/0002_service.sql"),
    include_str!("migrations/0003_logs.sql"),
];

pub(super) async fn migrate(pool: &AnyPool, dialect: Dialect, file: Option<&Path>) -> Result<(), Error> {
    pool.execute("CREATE TABLE IF NOT EXISTS schema_version (version BIGINT NOT NULL)").await?;
    let version = |row: Option<sqlx::any::AnyRow>| row.map_or(Ok(0), |row| row.try_get::<i64, _>(0));
    let found = version(sqlx::query("SELECT version FROM schema_version").fetch_optional(pool).await?)?;
    let known = MIGRATIONS.len() as i64;
    if found > known {
        return Err(Error::Newer { found, known });
    }
    if found == known {
        return Ok(());
    }
    if let (Some(file), true) = (file, found > 0) {
        let copy = file.with_extension(format!("before-{known}.db"));
        // An upgrade that was interrupted left its own, which would be in the way.
        let part = file.with_extension(format!("before-{known}.part"));
        if let Err(error) = std::fs::remove_file(&part)
            && error.kind() != ErrorKind::NotFound
        {
            return Err(sqlx::Error::Io(error).into());
        }
        // Through the database, so that what is in its log is in the copy.
        sqlx::query("VACUUM INTO $1").bind(part.display().to_string()).execute(pool).await?;
        std::fs::rename(&part, &copy).map_err(sqlx::Error::Io)?;
    }
    let mut transaction = pool.begin_with(dialect.begin()).await?;
    if dialect == Dialect::Postgres {
        // Of several processes that start at once, one migrates.
        transaction.execute("LOCK TABLE schema_version IN EXCLUSIVE MODE").await?;
    }
    let found = version(sqlx::query("SELECT version FROM schema_version").fetch_optional(&mut *transaction).await?)?;
    for migration in MIGRATIONS.iter().skip(usize::try_from(found).unwrap_or(0)) {
        for statement in statements(migration) {
            transaction.execute(statement).await?;
        }
    }
    transaction.execute("DELETE FROM schema_version").await?;
    sqlx::query("INSERT INTO schema_version (version) VALUES ($1)").bind(known).execute(&mut *transaction).await?;
    Ok(transaction.commit().await?)
}

/// One by one: drivers take one at a time. There are no semicolons in our texts.
fn statements(migration: &'static str) -> impl Iterator<Item = &'static str> {
    let code = |part: &&str| part.lines().any(|line| !line.trim().is_empty() && !line.trim_start().starts_with("--"));
    migration.split(";\n").filter(code)
}
