use candle_core::Device;
use serde::Deserialize;

use super::*;

#[derive(Deserialize)]
struct Case {
    config: serde_json::Value,
    steps: usize,
    tokens: usize,
    strength: f64,
    /// Steps left to walk.
    left: usize,
    /// Bits of all noise levels.
    sigmas: Vec<u32>,
}

fn bits(values: impl IntoIterator<Item = f32>) -> Vec<u32> {
    values.into_iter().map(f32::to_bits).collect()
}

#[test]
fn sigmas_and_first_steps_are_diffusers_bit_for_bit() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/noise/schedule.json");
    let cases: Vec<Case> = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    assert!(cases.len() >= 100);
    for case in cases {
        let place = format!("{}, {} steps, {} tokens, strength {}", case.config, case.steps, case.tokens, case.strength);
        let schedule = Schedule::read(Some(&case.config), true).unwrap();
        assert_eq!(bits(schedule.sigmas(case.steps, case.tokens)), case.sigmas, "{place}");
        assert_eq!(case.steps - first_step(case.steps, case.strength).unwrap(), case.left, "{place}");
    }
}

#[test]
fn without_a_config_the_published_schedules_are_taken() {
    for (name, guidance) in [("tiny-dev", true), ("tiny-schnell", false)] {
        let root = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures");
        let text = std::fs::read(format!("{root}/{name}/scheduler/scheduler_config.json")).unwrap();
        let published = Schedule::read(Some(&serde_json::from_slice(&text).unwrap()), !guidance).unwrap();
        assert_eq!(Schedule::read(None, guidance).unwrap(), published, "{name}");
    }
}

#[test]
fn settings_that_are_not_implemented_are_refused_by_name() {
    let read = |text: &str| Schedule::read(Some(&serde_json::from_str(text).unwrap()), true);
    let settings = [
        r#""use_karras_sigmas": true"#,
        r#""use_beta_sigmas": true"#,
        r#""use_exponential_sigmas": true"#,
        r#""use_flow_sigmas": true"#,
        r#""invert_sigmas": true"#,
        r#""stochastic_sampling": true"#,
        r#""shift_terminal": 0.1"#,
        r#""time_shift_type": "cubic""#,
        r#""_class_name": "DDIMScheduler""#,
        r#""num_train_timesteps": 500"#,
        r#""shift": -1"#,
    ];
    for setting in settings {
        let error = read(&format!("{{{setting}}}")).unwrap_err().to_string();
        let name = setting.split('"').nth(1).unwrap();
        assert!(error.contains(name), "{error}");
    }
    assert!(read(r#"{"unknown": 1, "shift_terminal": null, "use_karras_sigmas": false}"#).is_ok());
    assert!(matches!(read("[1]"), Err(Error::Config(_))));
    assert!(matches!(read(r#"{"shift": "three"}"#), Err(Error::Config(_))));
}

#[test]
fn a_walk_without_steps_is_an_error() {
    for strength in [0.0, -0.1, 1.001, f64::NAN, f64::INFINITY] {
        assert!(matches!(first_step(4, strength), Err(Error::Strength { .. })), "{strength}");
    }
    // So small that steps - steps * strength rounds to steps.
    assert!(matches!(first_step(4, 1e-17), Err(Error::NothingLeft { steps: 4, .. })));
    assert!(matches!(first_step(0, 1.0), Err(Error::NothingLeft { steps: 0, .. })));
}

#[test]
fn an_exact_velocity_leads_back_to_the_clean_latents() {
    let clean = Tensor::new(&[0.5f32, -2.0, 3.0], &Device::Cpu).unwrap();
    let noise = Tensor::new(&[1.5f32, 0.25, -0.125], &Device::Cpu).unwrap();
    let velocity = (&noise - &clean).unwrap();
    let sigmas = &Schedule::dev().sigmas(7, 300)[first_step(7, 0.6).unwrap()..];
    assert_eq!(sigmas.len(), 6);
    let mut latents = add_noise(&clean, &noise, sigmas[0]).unwrap();
    for pair in sigmas.windows(2) {
        latents = euler_step(&latents, &velocity, pair[0], pair[1]).unwrap();
        let expected = add_noise(&clean, &noise, pair[1]).unwrap();
        let difference = (&latents - expected).unwrap().abs().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap();
        assert!(difference < 1e-6, "off by {difference} at noise level {}", pair[1]);
    }
}
