//! The walls of the house: who may import whom, how long a file may be, and that the table of faults names tests that are there.

use std::path::{Path, PathBuf};

/// Longest source file, in lines.
const MAX_LINES: usize = 500;

/// Folder, and what its files must not import.
const WALLS: &[(&str, &[&str])] = &[
    ("kernels", &["models::", "tokio", "std::fs", "std::net", "reqwest"]),
    ("models", &["tokio", "axum", "sqlx", "reqwest", "hf_hub", "std::net", "std::time", "std::thread", "std::env", "darkroom::"]),
    ("src/engine", &["hf_hub", "reqwest", "axum", "sqlx", "clap"]),
    ("src/image", &["clap"]),
    ("src/fetch", &["models::", "clap"]),
    ("src/jobs", &["models::", "clap", "axum"]),
    ("src/prompt", &["models::", "clap"]),
    ("src/api", &["crate::cli", "candle_core", "use models::", "sqlx", "clap"]),
    ("src/ops", &["crate::cli", "crate::api", "clap::", "indicatif", "axum"]),
    ("src/cli", &["use models::", "sqlx", "hf_hub", "candle_core"]),
];

/// Folder or file, and all that it may know of the program beside itself.
const DOORS: &[(&str, &[&str])] = &[
    ("src/engine", &["bytes", "replace"]),
    ("src/image", &[]),
    ("src/fetch", &["bytes", "config", "hex", "replace"]),
    ("src/jobs", &["hex"]),
    ("src/blobs.rs", &["config"]),
    ("src/config.rs", &[]),
    ("src/prompt", &[]),
    ("src/bytes.rs", &[]),
    ("src/hex.rs", &[]),
    ("src/replace.rs", &[]),
];

/// What a manifest must not depend on.
const MANIFESTS: &[(&str, &[&str])] = &[
    ("kernels/Cargo.toml", &["tokio", "axum", "sqlx", "reqwest", "safetensors", "models."]),
    ("models/Cargo.toml", &["tokio", "axum", "sqlx", "reqwest", "hf-hub", "clap"]),
];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn sources(folder: &Path, extensions: &[&str]) -> Vec<PathBuf> {
    let mut found = Vec::new();
    if folder.is_file() {
        return vec![folder.to_owned()];
    }
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if path.is_dir() && !["target", "weights_cache"].contains(&name.as_str()) && !name.starts_with('.') {
            found.extend(sources(&path, extensions));
        } else if path.extension().is_some_and(|e| extensions.contains(&e.to_string_lossy().as_ref())) {
            found.push(path);
        }
    }
    found
}

/// The lines that `use` or name a path, without comments and without the tests at the end of a file.
fn code(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let body = text.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default();
    body.lines().enumerate().filter(|(_, line)| !line.trim_start().starts_with("//"))
}

/// The parts of the program that a line names: `crate::a` and `crate::{b, c::d}`.
fn named(line: &str) -> Vec<&str> {
    let first = |text: &str| text.find(|c: char| !(c.is_alphanumeric() || c == '_')).unwrap_or(text.len());
    let after = line.match_indices("crate::").map(|(at, found)| &line[at + found.len()..]);
    after
        .flat_map(|rest| match rest.strip_prefix('{') {
            Some(list) => list.split(',').map(str::trim).collect::<Vec<_>>(),
            None => vec![rest],
        })
        .map(|name| &name[..first(name)])
        .filter(|name| name.starts_with(char::is_lowercase))
        .collect()
}

#[test]
fn imports_go_one_way() {
    assert_eq!(named("use crate::{bytes, ops::Error}; crate::hex::hex(x)"), ["bytes", "ops", "hex"]);
    let mut faults = Vec::new();
    for (folder, allowed) in DOORS {
        let own = Path::new(folder).file_stem().unwrap().to_str().unwrap();
        for path in sources(&root().join(folder), &["rs"]) {
            let text = std::fs::read_to_string(&path).unwrap();
            for (i, line) in code(&text) {
                for name in named(line).into_iter().filter(|name| *name != own && !allowed.contains(name)) {
                    faults.push(format!("{}:{}: {folder} must not know {name}", path.display(), i + 1));
                }
            }
        }
    }
    for (folder, forbidden) in WALLS {
        for path in sources(&root().join(folder), &["rs"]) {
            if path.components().any(|part| part.as_os_str() == "tests") || path.ends_with("tests.rs") {
                continue;
            }
            let text = std::fs::read_to_string(&path).unwrap();
            for (i, line) in code(&text) {
                for name in forbidden.iter().filter(|name| line.contains(**name)) {
                    faults.push(format!("{}:{}: {folder} must not know {name}", path.display(), i + 1));
                }
            }
        }
    }
    assert!(faults.is_empty(), "{faults:#?}");
}

#[test]
fn manifests_keep_the_walls() {
    for (manifest, forbidden) in MANIFESTS {
        let text = std::fs::read_to_string(root().join(manifest)).unwrap();
        for name in *forbidden {
            assert!(!text.lines().any(|line| line.starts_with(name)), "{manifest} depends on {name}");
        }
    }
}

#[test]
fn files_are_short() {
    let long: Vec<String> = sources(root(), &["rs", "py", "cu", "cuh", "cpp", "hpp", "metal"])
        .into_iter()
        .filter_map(|path| {
            let lines = std::fs::read_to_string(&path).unwrap().lines().count();
            (lines > MAX_LINES).then(|| format!("{}: {lines} lines", path.display()))
        })
        .collect();
    assert!(long.is_empty(), "{long:#?}");
}

/// Every `file::test`, `folder::module` and `file.rs` of the table.
#[test]
fn the_table_of_faults_names_what_is_there() {
    let table = std::fs::read_to_string(root().join("docs/faults.md")).unwrap();
    let plain = |name: &&str| name.chars().all(|c| c.is_ascii_alphanumeric() || "_:.*".contains(c));
    let (tests, program) = (root().join("tests/it"), root().join("src"));
    for name in table.split('`').skip(1).step_by(2).filter(plain) {
        let there = match name.split_once("::") {
            Some((file, test)) => {
                let text = std::fs::read_to_string(tests.join(file).with_extension("rs")).unwrap_or_default();
                let module = program.join(name.replace("::", "/"));
                let shown = if test == "*" { !text.is_empty() } else { text.contains(&format!("fn {test}()")) };
                shown || module.is_dir() || module.with_extension("rs").is_file()
            }
            None => !name.ends_with(".rs") || tests.join(name).is_file(),
        };
        assert!(there, "docs/faults.md names {name}");
    }
}
