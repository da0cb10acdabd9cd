//! Everything that is tested through the crates' public face, as one binary.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    unreachable_pub,
    reason = "a test that cannot go on fails; figures are printed"
)]

mod card;
mod cli;
mod cli_fetch;
mod cli_lora;
mod cli_models;
mod e2e;
mod fetch;
mod fetch_left;
mod fetch_services;
mod fixtures;
mod fused;
mod hub;
pub(crate) mod jobs;
mod jobs_limits;
mod jobs_service;
mod layouts;
mod lora;
mod lora_convert;
mod lora_files;
mod lora_merge;
mod lora_others;
mod lora_properties;
mod lora_writers;
mod parity_encoders;
mod parity_flux;
mod plans;
mod pocket;
mod pocket_person;
mod readme;
mod serve;
mod serve_clients;
mod serve_crashes;
mod serve_dialects;
mod serve_faults;
mod serve_limits;
mod serve_tenants;
mod service;
mod site;
mod sweep;
mod sweep_browser;
mod sweep_figures;
mod tidy;
