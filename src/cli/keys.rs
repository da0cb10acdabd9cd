//! `darkroom keys`: who may use the server.

use std::path::PathBuf;

use chrono::{DateTime, SecondsFormat};
use clap::Subcommand;
use serde_json::json;

use super::serve::{Place, open};
use super::{say, show};
use crate::jobs::Key;

/// Who may use the server: make, list and revoke API keys
///
/// With no keys the server belongs to this machine. Once a key was made, every request needs one.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Make a key; it is shown once
    Create {
        /// Whose it is: jobs, pictures, uploads and private LoRAs are kept apart by this name
        #[arg(long, value_name = "NAME", value_parser = tenant)]
        tenant: String,
        /// What you call it
        #[arg(long, value_name = "TEXT", default_value = "")]
        label: String,
        /// May also see metrics, and see and empty the cache of LoRAs
        #[arg(long)]
        admin: bool,
        #[command(flatten)]
        place: Place,
    },
    /// List the keys
    List {
        /// For programs
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        place: Place,
    },
    /// End a key, at once
    Revoke {
        /// As it is listed
        id: String,
        #[command(flatten)]
        place: Place,
    },
}

fn tenant(text: &str) -> Result<String, String> {
    let good = (1..=64).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.@".contains(&byte));
    if good { Ok(text.into()) } else { Err("must be 1 to 64 letters, digits or -_.@".into()) }
}

pub(super) fn run(args: Args) -> anyhow::Result<()> {
    match args.verb {
        Verb::Create { tenant, label, admin, place } => {
            let (runtime, store, _) = open(&place)?;
            let (key, text) = runtime.block_on(store.create_key(&tenant, &label, admin)).map_err(crate::ops::Error::from)?;
            say(&format!("made the key {} of {}; this is the only time that it is shown:", key.id, key.tenant));
            show(&text)
        }
        Verb::List { json, place } => {
            let (runtime, store, _) = open(&place)?;
            let keys = runtime.block_on(store.keys()).map_err(crate::ops::Error::from)?;
            if json {
                let keys: Vec<_> = keys.iter().map(describe).collect();
                return show(&serde_json::to_string_pretty(&keys)?);
            }
            if keys.is_empty() {
                say("there are no keys: the server belongs to this machine");
            }
            keys.iter().try_for_each(|key| {
                let state = if key.revoked_at.is_some() { "revoked" } else { "valid" };
                let kind = if key.admin { "admin" } else { "user" };
                show(&format!("{}  {state:7}  {kind:5}  {}  {}  {}", key.id, time(key.created_at), key.tenant, key.label))
            })
        }
        Verb::Revoke { id, place } => {
            let (runtime, store, folder): (_, _, PathBuf) = open(&place)?;
            match runtime.block_on(store.revoke_key(&id)).map_err(crate::ops::Error::from)? {
                Some(key) => {
                    say(&format!("revoked the key {} of {}", key.id, key.tenant));
                    Ok(())
                }
                None => anyhow::bail!("there is no key {id:?} in {}; see: darkroom keys list", folder.display()),
            }
        }
    }
}

fn describe(key: &Key) -> serde_json::Value {
    json!({
        "id": key.id,
        "tenant": key.tenant,
        "label": key.label,
        "admin": key.admin,
        "created_at": time(key.created_at),
        "revoked_at": key.revoked_at.map(time),
    })
}

fn time(milliseconds: i64) -> String {
    DateTime::from_timestamp_millis(milliseconds).unwrap_or_default().to_rfc3339_opts(SecondsFormat::Secs, true)
}
