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
    /// Bits of all noise levels, and of the times told to the transformer on the steps left.
    sigmas: Vec<u32>,
    timesteps: Vec<u32>,
}

fn bits(values: impl IntoIterator<Item = f32>) -> Vec<u32> {
    values.into_iter().map(f32::to_bits).collect()
}

#[test]
fn sigmas_and_steps_are_diffusers_bit_for_bit() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/noise/schedule.json");
    let cases: Vec<Case> = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    assert!(cases.len() > 200);
    for case in cases {
        let place = format!("{}, {} steps, {} tokens, strength {}", case.config, case.steps, case.tokens, case.strength);
        let schedule = Schedule::from_json(case.config.to_string().as_bytes()).unwrap();
        let sigmas = schedule.sigmas(case.steps, case.tokens).unwrap();
        assert_eq!(bits(sigmas.clone()), case.sigmas, "{place}");
        let steps = schedule.steps(case.steps, case.tokens, case.strength).unwrap();
        assert_eq!(steps.len(), case.left, "{place}");
        assert_eq!(bits(steps.iter().map(|step| step.timestep)), case.timesteps, "{place}");
        let levels = steps.iter().map(|step| step.sigma).chain([0.0]);
        assert_eq!(bits(levels), bits(sigmas[case.steps - case.left..].to_vec()), "{place}");
    }
}

#[test]
fn published_schedules_are_those_of_the_published_configs() {
    for (name, schedule) in [("tiny-dev", Schedule::dev()), ("tiny-schnell", Schedule::schnell())] {
        let root = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures");
        let config = std::fs::read(format!("{root}/{name}/scheduler/scheduler_config.json")).unwrap();
        assert_eq!(Schedule::from_json(&config).unwrap(), schedule, "{name}");
    }
}

#[test]
fn settings_that_are_not_implemented_are_refused_by_name() {
    let switches = [
        r#""use_karras_sigmas": true"#,
        r#""use_beta_sigmas": true"#,
        r#""use_exponential_sigmas": true"#,
        r#""use_flow_sigmas": true"#,
        r#""invert_sigmas": true"#,
        r#""stochastic_sampling": true"#,
        r#""shift_terminal": 0.1"#,
        r#""time_shift_type": "cubic""#,
        r#""_class_name": "DDIMScheduler""#,
        r#""num_train_timesteps": 0"#,
        r#""shift": -1"#,
    ];
    for switch in switches {
        let error = Schedule::from_json(format!("{{{switch}}}").as_bytes()).unwrap_err().to_string();
        let name = switch.split('"').nth(1).unwrap();
        assert!(error.contains(name), "{error}");
    }
    assert!(Schedule::from_json(br#"{"unknown": 1, "shift_terminal": null, "use_karras_sigmas": false}"#).is_ok());
    assert!(matches!(Schedule::from_json(b"<html>"), Err(Error::Config(_))));
}

#[test]
fn a_walk_without_steps_is_an_error() {
    let schedule = Schedule::dev();
    assert!(matches!(schedule.sigmas(0, 64), Err(Error::NoSteps)));
    for strength in [0.0, -0.1, 1.001, f64::NAN, f64::INFINITY] {
        assert!(matches!(schedule.steps(4, 64, strength), Err(Error::Strength { .. })), "{strength}");
    }
    // So small that steps - steps * strength rounds to steps.
    assert!(matches!(schedule.steps(4, 64, 1e-17), Err(Error::NothingLeft { steps: 4, .. })));
}

#[test]
fn an_exact_velocity_leads_back_to_the_clean_latents() {
    let clean = Tensor::new(&[0.5f32, -2.0, 3.0], &Device::Cpu).unwrap();
    let noise = Tensor::new(&[1.5f32, 0.25, -0.125], &Device::Cpu).unwrap();
    let velocity = (&noise - &clean).unwrap();
    let steps = Schedule::dev().steps(7, 300, 0.6).unwrap();
    let mut latents = add_noise(&clean, &noise, steps[0].sigma).unwrap();
    for step in &steps {
        latents = step.advance(&latents, &velocity).unwrap();
        let expected = add_noise(&clean, &noise, step.next).unwrap();
        let difference = (&latents - expected).unwrap().abs().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap();
        assert!(difference < 1e-6, "off by {difference} at noise level {}", step.next);
    }
}
