//! From a repository or a model's number to the link of one file.

use serde_json::Value;
use url::Url;

use super::client::{Ask, Client};
use super::{Credentials, Error, Reference, names_weights, peft};

/// One file to be fetched, and what its source says of it beforehand.
#[derive(Debug, Clone)]
pub(super) struct Located {
    pub(super) ask: Ask,
    /// Names this very state, where the source has such a name: a commit's file never changes.
    pub(super) version: Option<String>,
    pub(super) sha256: Option<String>,
    pub(super) bytes: Option<u64>,
    /// Its name is for everybody, its content for some: what is in the cache is for those who could fetch it now.
    pub(super) gated: bool,
    /// Settings that lie beside it, see `peft.rs`.
    pub(super) config: Option<Ask>,
}

/// Where the services are.
#[derive(Debug, Clone)]
pub(super) struct Services {
    pub(super) hub: String,
    pub(super) civitai: String,
}

const CHECK_LINK: &str = "check the link, or ask for a new one if it is a signed one";

impl Services {
    /// Asks the service, where there is one, which file is meant.
    pub(super) async fn locate(
        &self,
        client: &Client,
        reference: &Reference,
        credentials: &Credentials,
    ) -> Result<Located, Error> {
        match reference {
            Reference::Hub { repo, revision, file } => self.hub(client, repo, revision, file.as_deref(), credentials).await,
            Reference::CivitaiModel(id) => self.civitai_model(client, *id, credentials).await,
            Reference::CivitaiVersion(id) => self.civitai(&format!("{}/api/download/models/{id}", self.civitai), credentials),
            Reference::Link(url) if self.is_civitai(url) => self.civitai(url.as_str(), credentials),
            Reference::Link(url) => {
                let unauthorized = "the link is a private one or has expired; ask for a new signed link".into();
                let ask = Ask { url: url.clone(), bearer: None, unauthorized, not_found: CHECK_LINK.into() };
                Ok(Located { ask, version: None, sha256: None, bytes: None, gated: false, config: None })
            }
            _ => Err(Error::Unknown("a file".into())),
        }
    }

    async fn hub(
        &self,
        client: &Client,
        repo: &str,
        revision: &str,
        file: Option<&str>,
        credentials: &Credentials,
    ) -> Result<Located, Error> {
        let unauthorized = match &credentials.hub {
            None => format!(
                "the repository is private, gated or does not exist; accept its licence on {}/{repo} and set HF_TOKEN to a token with read access",
                self.hub
            ),
            Some(_) => format!("the token does not reach it; accept the licence on {}/{repo} with the token's account", self.hub),
        };
        let ask = |path: String, not_found: String| -> Result<Ask, Error> {
            let url = Url::parse(&format!("{}/{path}", self.hub)).map_err(|_| Error::Unknown(self.hub.clone()))?;
            Ok(Ask { url, bearer: credentials.hub.clone(), unauthorized: unauthorized.clone(), not_found })
        };
        let missing = format!("check owner, name and revision ({revision}) on {}", self.hub);
        let listing = client.json(&ask(format!("api/models/{repo}/revision/{revision}?blobs=true"), missing)?).await?;
        let understood = || Error::Answer(self.hub.clone());
        let commit = listing["sha"].as_str().ok_or_else(understood)?;
        let siblings = listing["siblings"].as_array().ok_or_else(understood)?;
        let name = |sibling: &Value| sibling["rfilename"].as_str().unwrap_or_default().to_owned();
        let weights = |sibling: &&Value| names_weights(&name(sibling));
        let found = match file {
            Some(file) => siblings.iter().find(|sibling| name(sibling) == file),
            None => {
                let mut files: Vec<String> = siblings.iter().filter(weights).map(&name).collect();
                files.sort();
                match files.len() {
                    0 => return Err(Error::NoFile { repo: repo.into() }),
                    1 => siblings.iter().find(weights),
                    _ => return Err(Error::SeveralFiles { repo: repo.into(), files }),
                }
            }
        };
        let Some(found) = found else {
            let mut files: Vec<String> = siblings.iter().filter(weights).map(&name).collect();
            files.sort();
            let hint = format!("the repository holds: {}", files.join(", "));
            return Err(Error::NotFound { what: format!("{} in {repo}", file.unwrap_or_default()), hint });
        };
        let file = name(found);
        let at = |file: &str| {
            let path = percent_encoding::utf8_percent_encode(file, PATH);
            ask(format!("{repo}/resolve/{commit}/{path}"), "the repository changed at this moment; try again".into())
        };
        let config = peft::config_of(&file).filter(|config| siblings.iter().any(|sibling| name(sibling) == *config));
        Ok(Located {
            ask: at(&file)?,
            config: config.as_deref().map(at).transpose()?,
            // What was kept before settings were heeded is another state.
            version: Some(format!("{commit}/{file}{}", if config.is_some() { " with its settings" } else { "" })),
            sha256: found["lfs"]["sha256"].as_str().map(str::to_owned),
            bytes: found["size"].as_u64(),
            gated: !matches!(listing["gated"], Value::Bool(false) | Value::Null),
        })
    }

    fn is_civitai(&self, url: &Url) -> bool {
        Url::parse(&self.civitai).is_ok_and(|service| service.origin() == url.origin())
    }

    fn civitai(&self, link: &str, credentials: &Credentials) -> Result<Located, Error> {
        let url = Url::parse(link).map_err(|_| Error::Unknown("civitai".into()))?;
        let unauthorized = match &credentials.civitai {
            None => "set CIVITAI_API_TOKEN to a token of your account's settings".into(),
            Some(_) => "the token does not reach it: the creator may ask for early access".into(),
        };
        let not_found =
            "the number must be that of the version, which the download link ends with, not that of the model's page".into();
        let ask = Ask { url, bearer: credentials.civitai.clone(), unauthorized, not_found };
        Ok(Located { ask, version: None, sha256: None, bytes: None, gated: false, config: None })
    }

    async fn civitai_model(&self, client: &Client, id: u64, credentials: &Credentials) -> Result<Located, Error> {
        let mut page = self.civitai(&format!("{}/api/v1/models/{id}", self.civitai), credentials)?;
        page.ask.not_found = "no model has this number; open its page and copy the link".into();
        let model = client.json(&page.ask).await?;
        // The newest comes first.
        let versions = model["modelVersions"].as_array().cloned().unwrap_or_default();
        let flux =
            |version: &&Value| version["baseModel"].as_str().is_some_and(|base| base.to_ascii_lowercase().contains("flux"));
        let version = versions.iter().find(flux).or(versions.first());
        let version = version.and_then(|version| version["id"].as_u64()).ok_or_else(|| Error::NotFound {
            what: format!("a version of model {id} on CivitAI"),
            hint: "open its page and copy the link of the download".into(),
        })?;
        self.civitai(&format!("{}/api/download/models/{version}", self.civitai), credentials)
    }
}

/// What must be escaped in a path, slashes aside.
const PATH: &percent_encoding::AsciiSet = &percent_encoding::CONTROLS
    .add(b' ')
    .add(b'"')
    .add(b'#')
    .add(b'<')
    .add(b'>')
    .add(b'?')
    .add(b'`')
    .add(b'{')
    .add(b'}')
    .add(b'%');
