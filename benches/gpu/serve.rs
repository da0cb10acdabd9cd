//! One loaded model, told over stdin what to time: darkroom's side of `benches/peers`, whose README has the protocol.

use std::collections::HashMap;
use std::io::{BufRead, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use candle_core::Device;
use darkroom::engine::{Adapter, Error, Event, Finished, Job, LoraMode, NoiseKind, Pipeline, Plan, Scales, Selected};
use models::bundle::Bundle;
use serde::Deserialize;
use serde_json::{Value, json};

/// One line of stdin.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Request {
    run: Run,
    /// How often.
    #[serde(default = "one")]
    count: usize,
    /// Of a picture.
    #[serde(default = "steps")]
    steps: usize,
    /// Of a side.
    #[serde(default = "pixels")]
    pixels: usize,
    /// A LoRA's file; none takes LoRAs off.
    file: Option<PathBuf>,
    #[serde(default = "scale")]
    scale: f64,
    /// The file as it was opened last, which this process still has.
    #[serde(default)]
    resident: bool,
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Run {
    About,
    Step,
    Picture,
    Decode,
    Encode,
    Lora,
}

fn one() -> usize {
    1
}

fn steps() -> usize {
    28
}

fn pixels() -> usize {
    1024
}

fn scale() -> f64 {
    1.
}

struct Server {
    pipeline: Pipeline,
    device: Device,
    loras: Vec<Selected>,
    /// LoRAs by their files, as they were opened last.
    opened: HashMap<PathBuf, Arc<Adapter>>,
    /// Prompts that were asked for so far.
    prompts: u64,
}

/// Answers until stdin ends.
pub(crate) fn run(device: &Device, plan: Plan, model: &Path) -> anyhow::Result<()> {
    let pipeline = Pipeline::load(&Bundle::detect(model)?, device, plan, &mut |_| {})?;
    device.synchronize()?;
    let mut server = Server { pipeline, device: device.clone(), loras: Vec::new(), opened: HashMap::new(), prompts: 0 };
    let mut answers = std::io::stdout().lock();
    for line in std::io::stdin().lock().lines() {
        let request = serde_json::from_str::<Request>(&line?).map_err(anyhow::Error::from);
        let answer = request.and_then(|request| server.answer(&request));
        let answer = answer.unwrap_or_else(|error| json!({"error": format!("{error:#}")}));
        writeln!(answers, "{answer}")?;
        answers.flush()?;
    }
    Ok(())
}

impl Server {
    fn answer(&mut self, request: &Request) -> anyhow::Result<Value> {
        match request.run {
            Run::About => Ok(json!({"about": {
                "config": "darkroom",
                "version": env!("CARGO_PKG_VERSION"),
                "dtype": self.pipeline.plan().name(),
                "plan": self.pipeline.plan().to_string(),
                "kernels": self.pipeline.kernels(),
                "text_tokens": self.pipeline.text_tokens(),
            }})),
            Run::Step => self.step(request),
            Run::Picture => self.jobs(request, request.steps, |_, whole| whole),
            Run::Decode => self.jobs(request, 1, |finished, _| finished.timings.decode),
            Run::Encode => self.jobs(request, 1, |finished, _| finished.timings.encode),
            Run::Lora => self.lora(request),
        }
    }

    /// Never the same prompt twice, unless `prompt` is given: the pipeline remembers the prompts that it encoded.
    fn job(&mut self, request: &Request, steps: usize, prompt: Option<&str>) -> Job {
        self.prompts += 1;
        let numbered = || {
            format!(
                "a portrait of a person with long red hair and glasses, smiling, wearing a blue shirt, picture {}",
                self.prompts
            )
        };
        Job {
            prompt: prompt.map_or_else(numbered, str::to_owned),
            negative_prompt: String::new(),
            width: request.pixels,
            height: request.pixels,
            steps,
            guidance: 3.5,
            true_cfg: 1.,
            seed: self.prompts,
            outputs: 1,
            noise: NoiseKind::Cpu,
            start: None,
            loras: self.loras.clone(),
            lora_mode: LoraMode::Auto,
            previews: None,
        }
    }

    /// One step more than asked for: the first, which the making of the noise counts to, is told apart.
    fn step(&mut self, request: &Request) -> anyhow::Result<Value> {
        let steps = request.count + 1;
        let job = self.job(request, steps, Some("a portrait"));
        let mut ends = Vec::new();
        let result = self.pipeline.run(&job, &mut |event| {
            match event {
                Event::Encoding => ends.push(Instant::now()),
                Event::Step { step, .. } => {
                    ends.push(Instant::now());
                    // There is no need to see the picture.
                    if step == steps {
                        return ControlFlow::Break(());
                    }
                }
                Event::Preview { .. } | Event::Decoding { .. } => {}
            }
            ControlFlow::Continue(())
        });
        match result {
            Err(Error::Cancelled) => {}
            Err(error) => return Err(error.into()),
            Ok(_) => anyhow::bail!("the last step was not told of"),
        }
        let times: Vec<f64> = ends.windows(2).map(|pair| milliseconds(pair[1] - pair[0])).collect();
        let (first, rest) = times.split_first().ok_or_else(|| anyhow::anyhow!("no step was told of"))?;
        Ok(json!({"ms": rest, "first_ms": first}))
    }

    /// Whole jobs, of each the part that `pick` takes.
    fn jobs(&mut self, request: &Request, steps: usize, pick: impl Fn(&Finished, Duration) -> Duration) -> anyhow::Result<Value> {
        let mut times = Vec::new();
        for _ in 0..request.count {
            let job = self.job(request, steps, None);
            let start = Instant::now();
            let finished = self.pipeline.run(&job, &mut |_| ControlFlow::Continue(()))?;
            times.push(milliseconds(pick(&finished, start.elapsed())));
        }
        Ok(json!({"ms": times}))
    }

    /// Reading and checking the file is told apart from the switch.
    fn lora(&mut self, request: &Request) -> anyhow::Result<Value> {
        let (mut set, mut read) = (Vec::new(), Duration::ZERO);
        if let Some(file) = &request.file {
            if !request.resident {
                let start = Instant::now();
                let adapter = Arc::new(Adapter::open(file)?);
                read = start.elapsed();
                self.opened.insert(file.clone(), adapter);
            }
            let adapter = self.opened.get(file).ok_or_else(|| anyhow::anyhow!("{} was not opened yet", file.display()))?;
            set.push(Selected { adapter: adapter.clone(), scales: Scales::uniform(request.scale) });
        }
        let mode = self.pipeline.lora_mode(LoraMode::Auto);
        self.device.synchronize()?;
        let start = Instant::now();
        self.pipeline.patches().apply(&set, mode)?;
        self.device.synchronize()?;
        let time = start.elapsed();
        self.loras = set;
        Ok(json!({"ms": [milliseconds(time)], "read_ms": milliseconds(read)}))
    }
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
