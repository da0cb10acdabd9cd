//! LoRA files of other models, files that say a thing twice, and what files say beside the changes that are applied.

use std::collections::BTreeMap;

use candle_core::{DType, Tensor};
use models::lora::{Adapter, Report};

use crate::cli::Place;
use crate::lora_files::{D, Folder, merged, named, number, random, refused};

type Tensors = Vec<(String, Tensor)>;

/// A low-rank change of a module.
fn change(stem: &str, up: &Tensor, down: &Tensor) -> Tensors {
    named(&[(&format!("{stem}.lora_A.weight"), down), (&format!("{stem}.lora_B.weight"), up)])
}

/// Of a square matrix.
fn square(stem: &str, width: usize) -> Tensors {
    change(stem, &random(&[width, 2]), &random(&[2, width]))
}

fn header(pairs: &[(&str, &str)]) -> Option<BTreeMap<String, String>> {
    Some(pairs.iter().map(|(key, text)| ((*key).to_owned(), (*text).to_owned())).collect())
}

const PROJ: &str = "double_blocks.0.img_attn.proj";
const CLIP: &str = "lora_te1_text_model_encoder_layers_0_mlp_fc1";
const ARCHITECTURE: &str = "modelspec.architecture";
const VERSION: &str = "ss_base_model_version";

#[test]
fn headers_that_name_another_model_are_believed() {
    let folder = Folder::new();
    let file =
        |stem: &str, texts: &[(&str, &str)]| folder.write_with("a.safetensors", &square(stem, D), DType::F32, header(texts));
    for (texts, part) in [
        (&[(ARCHITECTURE, "hunyuan-video/lora")][..], "Hunyuan"),
        (&[(VERSION, "hunyuanvideo")], "Hunyuan"),
        (&[(ARCHITECTURE, "stable-diffusion-3-5-large/lora")], "Stable Diffusion 3"),
        (&[(VERSION, "sd3_m")], "Stable Diffusion 3"),
        (&[(ARCHITECTURE, "chroma/lora"), (VERSION, "flux1")], "Chroma"),
        (&[(ARCHITECTURE, "Flux.2-dev/lora")], "FLUX.2"),
        (&[(VERSION, "flux2_klein_4b")], "FLUX.2"),
        (&[(VERSION, "qwen_image")], "Qwen"),
        (&[(VERSION, "wan_2.1")], "Wan"),
        (&[(VERSION, "zimage:turbo")], "Z-Image"),
    ] {
        let (code, reason) = refused(&file(PROJ, texts));
        assert!(code == "wrong_base" && reason.contains(part) && reason.contains("header"), "{texts:?}: {code}: {reason}");
    }
    for texts in [
        &[(ARCHITECTURE, "flux-1-dev/lora")][..],
        &[(ARCHITECTURE, "flux-1-schnell/lora")],
        &[(ARCHITECTURE, "Flux.1-kontext-dev")],
        &[(ARCHITECTURE, "flux-1-fill-dev/lora"), (VERSION, "hunyuan")],
        &[(VERSION, "flux1")],
        &[(VERSION, "Flux")],
        &[(VERSION, "flux_kontext")],
        &[(VERSION, "flex1")],
        // ai-toolkit says so in LoRAs of FLUX.1.
        &[(VERSION, "sd_1.5")],
        &[(ARCHITECTURE, "stable-diffusion-xl-v1-base/lora"), (VERSION, "sdxl_1.0")],
    ] {
        Adapter::open(&file(PROJ, texts)).unwrap_or_else(|error| panic!("{texts:?}: {error}"));
    }
    // Nothing but CLIP, which Stable Diffusion has as well.
    let (code, reason) = refused(&file(CLIP, &[(ARCHITECTURE, "stable-diffusion-v1/lora")]));
    assert!(code == "wrong_base" && reason.contains("Stable Diffusion"), "{code}: {reason}");
    Adapter::open(&file(CLIP, &[(VERSION, "sd_1.5")])).unwrap();
}

#[test]
fn blocks_that_flux_does_not_have_are_another_models() {
    let folder = Folder::new();
    // One strange module among three.
    let file = |stem: &str| {
        let tensors = [square(stem, 4), square("img_in", 64), square(PROJ, 4)].concat();
        folder.write("a.safetensors", &tensors, DType::F32)
    };
    for (stem, last) in [
        ("transformer.transformer_blocks.#.attn.to_out.0", 18),
        ("base_model.model.transformer_blocks.#.attn.to_out.0", 18),
        ("lora_transformer_transformer_blocks_#_attn_to_out_0", 18),
        ("lora_unet_double_blocks_#_txt_attn_proj", 18),
        ("diffusion_model.double_blocks.#.txt_attn.proj", 18),
        ("double_blocks.#.processor.proj_lora2", 18),
        ("transformer.single_transformer_blocks.#.attn.to_q", 37),
        ("lycoris_single_transformer_blocks_#_attn_to_q", 37),
        ("lora_unet_single_blocks_#_modulation_lin", 37),
        ("single_blocks.#.modulation.lin", 37),
    ] {
        let at = |number: usize| file(&stem.replace('#', &number.to_string()));
        assert_eq!(Adapter::open(&at(last)).unwrap().report.modules_matched, 3, "{stem}");
        for number in [last + 1, 59] {
            let (code, reason) = refused(&at(number));
            let says = reason.contains(&format!("blocks {number}")) && reason.contains(&format!("end at {last};"));
            assert!(code == "wrong_base" && says, "{stem}: {code}: {reason}");
        }
    }
    for (stem, part) in [
        ("lora_unet_double_blocks_0_img_mlp_fc1", "HunyuanVideo"),
        ("diffusion_model.double_blocks.0.txt_mlp.fc2", "HunyuanVideo"),
        ("transformer.single_transformer_blocks.0.attn.to_out", "FLUX.2"),
    ] {
        let (code, reason) = refused(&file(stem));
        assert!(code == "wrong_base" && reason.contains(part), "{stem}: {code}: {reason}");
    }
    // FLUX.1's `linear1` is seven times as high as it is wide.
    let linear1 = |times: usize| {
        let tensors = change("diffusion_model.single_blocks.0.linear1", &random(&[times * 8, 2]), &random(&[2, 8]));
        folder.write("linear1.safetensors", &tensors, DType::F32)
    };
    assert!(refused(&linear1(9)).1.contains("FLUX.2"));
    Adapter::open(&linear1(7)).unwrap();
}

#[test]
fn a_report_without_a_base_says_how_wide_it_must_be() {
    let folder = Folder::new();
    let notes = |tensors: &Tensors| {
        let file = folder.write("a.safetensors", tensors, DType::F32);
        assert_eq!(Adapter::open(&file).unwrap().report.notes, [""; 0]);
        let report = Adapter::inspect(&file);
        assert!(report.refused.is_none());
        report.notes.join(" ")
    };
    assert!(notes(&square(PROJ, D)).contains("64 wide"));
    let narrowing = change("single_blocks.0.linear2", &random(&[1536, 1]), &random(&[1, 7680]));
    assert!(notes(&narrowing).contains("1536 wide"));
    let of_flux = change("single_blocks.0.linear2", &random(&[3072, 1]), &random(&[1, 15360]));
    assert_eq!(notes(&[of_flux, square("transformer.transformer_blocks.3.attn.to_q", 3072)].concat()), "");
    assert_eq!(notes(&square(CLIP, 8)), "");
}

#[test]
fn one_lora_under_two_namings_counts_once() {
    let folder = Folder::new();
    let (up, down) = (random(&[3 * D, 4]), random(&[4, D]));
    let name = "double_blocks.0.img_attn.qkv";
    let stem = "lora_unet_double_blocks_0_img_attn_qkv";
    let mut whole = change(stem, &up, &down);
    whole.push((format!("{stem}.alpha"), number(2.)));
    let members: Tensors = (0..3)
        .flat_map(|i| {
            let up = (up.narrow(0, i * D, D).unwrap().contiguous().unwrap() * 0.5).unwrap();
            change(&format!("transformer.transformer_blocks.0.attn.to_{}", ["q", "k", "v"][i]), &up, &down)
        })
        .collect();
    let file = |tensors: &[&Tensors]| {
        let all: Tensors = tensors.iter().flat_map(|tensors| tensors.iter().cloned()).collect();
        folder.write("a.safetensors", &all, DType::F32)
    };
    let bits = |tensors: &[&Tensors]| merged(&file(tensors), &format!("{name}.weight"));
    let report = |tensors: &[&Tensors]| -> Report { Adapter::open(&file(tensors)).unwrap().report };
    let told = |report: &Report| report.warnings.iter().any(|warning| warning.contains("two namings"));

    assert!(bits(&[&whole, &members]) == bits(&[&whole]));
    let found = report(&[&whole, &members]);
    assert!(told(&found) && found.warnings[0].contains("3 modules") && found.modules_matched == 1, "{:?}", found.warnings);
    assert!(!told(&report(&[&whole])) && !told(&report(&[&members])));
    // What is not complete, or zero, does not stand for what is.
    let without_up: Tensors = whole.iter().filter(|(key, _)| !key.contains("lora_B")).cloned().collect();
    assert!(bits(&[&without_up, &members]) == bits(&[&members]));
    let idle = change(stem, &up.zeros_like().unwrap(), &down);
    assert!(bits(&[&idle, &members]) == bits(&[&members]));
    // A bias, another tensor, and what one naming says by itself are no repetition.
    let bias = named(&[(&format!("{stem}.diff_b"), &random(&[3 * D]))]);
    for more in [bias, square(PROJ, D), square("single_blocks.0.linear1_qkv", D)] {
        let found = report(&[&members, &more]);
        assert!(found.modules_matched == 4 && !told(&found), "{:?}", found.warnings);
    }
    let found = report(&[&whole, &change(&format!("{name}.0"), &random(&[D, 2]), &random(&[2, D]))]);
    assert!(found.modules_matched == 2 && !told(&found), "{:?}", found.warnings);
}

#[test]
fn headers_of_large_data_sets_are_read() {
    let folder = Folder::new();
    let file = |megabytes: usize| {
        let texts = header(&[("ss_tag_frequency", "x".repeat(megabytes << 20).as_str())]);
        folder.write_with("a.safetensors", &square(PROJ, D), DType::F32, texts)
    };
    assert_eq!(Adapter::open(&file(15)).unwrap().report.modules_matched, 1);
    let (code, reason) = refused(&file(17));
    assert!(code == "over_limit" && reason.contains("metadata"), "{code}: {reason}");
}

#[test]
fn a_whole_lokr_of_pefts_has_the_alpha_of_its_pattern() {
    let folder = Folder::new();
    let stems = ["base_model.model.proj_out", "base_model.model.single_transformer_blocks.0.proj_out"];
    let tensors: Tensors = stems
        .iter()
        .flat_map(|stem| named(&[(&format!("{stem}.lokr_w1"), &random(&[4, 4])), (&format!("{stem}.lokr_w2"), &random(&[4, 4]))]))
        .collect();
    let config = r#"{"peft_type": "LOKR", "r": 8, "alpha": 8, "alpha_pattern": {"single_transformer_blocks.0.proj_out": 80}}"#;
    let file = folder.write_with("a.safetensors", &tensors, DType::F32, header(&[("adapter_config", config)]));
    let updates = Adapter::open(&file).unwrap().updates;
    let factors: Vec<_> = updates.iter().map(|update| (update.module.name.as_str(), update.change.factor)).collect();
    assert_eq!(factors, [("final_layer.linear", 1.), ("single_blocks.0.linear2", 10.)]);
    let tensors = square("base_model.model.proj_out", 8);
    let config = header(&[("adapter_config", r#"{"lora_alpha": 8, "alpha_pattern": {"(?!x).*": 1}}"#)]);
    let (code, reason) = refused(&folder.write_with("a.safetensors", &tensors, DType::F32, config));
    assert!(code == "unsupported" && reason.contains("(?!x).*"), "{code}: {reason}");
}

#[test]
fn algorithms_that_are_not_done_are_called_by_their_names() {
    let folder = Folder::new();
    let proj = "double_blocks_0_img_attn_proj";
    let peft = "base_model.model.transformer_blocks.0.attn.to_q";
    for (keys, part) in [
        (vec![format!("oft_unet_{proj}.oft_blocks"), format!("oft_unet_{proj}.alpha")], "this is OFT"),
        (vec![format!("oft_unet_{proj}.oft_blocks.0"), format!("oft_unet_{proj}.oft_blocks.1")], "this is OFT"),
        (vec![format!("lora_unet_{proj}.oft_blocks"), format!("lora_unet_{proj}.rescale")], "this is OFT"),
        (vec![format!("{peft}.boft_R"), format!("{peft}.boft_s")], "this is BOFT"),
        (vec![format!("{peft}.ia3_l")], "this is IA3"),
        (["a1", "a2", "b1", "b2"].map(|part| format!("lora_unet_{proj}.{part}.weight")).to_vec(), "this is GLoRA"),
    ] {
        let tensors: Tensors = keys.iter().map(|key| (key.clone(), random(&[4, 4]))).collect();
        let (code, reason) = refused(&folder.write("a.safetensors", &tensors, DType::F32));
        assert!(code == "unsupported" && reason.contains(part), "{keys:?}: {code}: {reason}");
    }
}

/// Embeddings and whole weights are no changes that are applied: every command says so.
#[test]
fn what_is_left_out_is_told() {
    let (folder, place) = (Folder::new(), Place::new());
    let mut tensors = square("transformer.transformer_blocks.0.attn.to_q", D);
    for key in ["bundle_emb.ohwx.clip_l", "bundle_emb.ohwx.t5_out", "bundle_emb.a.b.t5", "proj_out.weight"] {
        tensors.push((key.to_owned(), random(&[2, 4])));
    }
    let file = folder.write("a.safetensors", &tensors, DType::F32);
    let report = Adapter::inspect(&file);
    let [whole, embeddings] = report.warnings.as_slice() else { panic!("{:?}", report.warnings) };
    assert!(whole.contains("modules_to_save") && whole.contains("proj_out.weight"), "{whole}");
    assert!(embeddings.contains("embeddings of its own for a.b, ohwx, which are not applied"), "{embeddings}");
    assert!(!report.notes.iter().any(|note| note.contains("bookkeeping")), "{:?}", report.notes);

    let file = file.display().to_string();
    let json = place.run(&["lora", "inspect", &file, "--json"]).succeeds().json();
    assert_eq!(json["warnings"], serde_json::json!([whole, embeddings]));
    let shown = place.run(&["lora", "inspect", &file]).succeeds().out();
    assert!(shown.contains(whole) && shown.contains(embeddings), "{shown}");
    let said = place.run(&["lora", "convert", &file, "b.safetensors", "--to", "kohya"]).succeeds().err();
    assert!(said.contains(&format!("warning: {whole}\nwarning: {embeddings}\n")), "{said}");
    let json = place.generate(&["--lora", &file, "--json", "-o", "a.png"]).succeeds().json();
    let remarks: Vec<&str> = json["remarks"].as_array().unwrap().iter().filter_map(|remark| remark.as_str()).collect();
    assert!(remarks.contains(&whole.as_str()) && remarks.contains(&embeddings.as_str()), "{remarks:?}");
}
