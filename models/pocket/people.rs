//! The five invented people of `people.py`: a LoRA of each, and the faces that they are recognised by.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use serde::Deserialize;

use super::probe::Face;

/// What `train_person.py` wrote under diffusers' names. The names are the trigger words, but for the second LoRA of one person.
const LORAS: [(&str, &[u8]); 6] = [
    ("user1001", include_bytes!("people/user1001.safetensors")),
    ("user1002", include_bytes!("people/user1002.safetensors")),
    ("user1003", include_bytes!("people/user1003.safetensors")),
    ("user1004", include_bytes!("people/user1004.safetensors")),
    ("user1005", include_bytes!("people/user1005.safetensors")),
    ("user1001-retrained", include_bytes!("people/user1001-retrained.safetensors")),
];

/// The safetensors file of the LoRA that has this name.
#[must_use]
pub fn lora(name: &str) -> Option<&'static [u8]> {
    LORAS.iter().find(|(known, _)| *known == name).map(|(_, bytes)| *bytes)
}

/// Who a face belongs to, by the rule of `identity.py`: the nearest of the five if she is near enough, else nobody.
#[must_use]
pub fn recognise(face: &Face) -> Option<&'static str> {
    let near = KNOWN.people.iter().map(|(name, known)| (name.as_str(), face.distance(known)));
    near.filter(|(_, distance)| *distance < KNOWN.threshold).min_by(|a, b| a.1.total_cmp(&b.1)).map(|(name, _)| name)
}

/// How far a face is from one of the five; see [`Face::distance`].
#[must_use]
pub fn distance(face: &Face, name: &str) -> Option<f64> {
    KNOWN.people.get(name).map(|known| face.distance(known))
}

struct Known {
    threshold: f64,
    people: BTreeMap<String, Face>,
}

static KNOWN: LazyLock<Known> = LazyLock::new(|| {
    let rule: Rule = serde_json::from_str(include_str!("people.json")).expect("a part of the program, which the tests read");
    let face = |Person { features, kinds: k }| Face::known(features, [k.eye_color, k.mark, k.nose_shape, k.brows, k.skin]);
    Known { threshold: rule.threshold, people: rule.people.into_iter().map(|(name, person)| (name, face(person))).collect() }
});

/// `people.json`, as far as it is needed here.
#[derive(Deserialize)]
struct Rule {
    threshold: f64,
    people: BTreeMap<String, Person>,
}

#[derive(Deserialize)]
struct Person {
    features: [f64; 9],
    kinds: Kinds,
}

#[derive(Deserialize)]
struct Kinds {
    eye_color: usize,
    mark: usize,
    nose_shape: usize,
    brows: usize,
    skin: usize,
}
