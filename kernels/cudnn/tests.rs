//! What can be looked at without a card: whether cuDNN, where it is installed, accepts the graphs, and makes plans for a card that is
//! only described to it.

#![allow(clippy::print_stdout, reason = "tests say what they could not look at")]

use candle_core::{DType, Device, Tensor};

use super::attention::{self, Form};
use super::backend::{Descriptor, Failure, Library, Value, dotted};
use super::codes::{attribute, descriptor, heuristics, note};
use super::convolution;
use super::graph::{Operations, Plan, Target};
use crate::ops::convolve::Window;

/// An H200, as far as cuDNN asks.
const H200: &str = r#"{"cudaDeviceId":0,"deviceName":"NVIDIA H200","deviceVer":900,"driverVer":13000,"isTccDriver":0,"l2CacheSize":62914560,
"maxBlockSize":[1024,1024,64],"maxCtasPerSM":32,"maxGridSize":[2147483647,65535,65535],"maxRegistersPerSM":65536,
"maxSharedMemoryPerBlock":49152,"maxSharedMemoryPerBlockOptin":232448,"maxThreadsPerBlock":1024,"maxThreadsPerSM":2048,
"memClockRateKHz":3201000,"memoryBusWidth":6144,"multiProcessorCount":132,"oversizedSharedMemoryPerBlock":0,"pciDeviceId":0,
"regsPerBlock":65536,"reservedSharedMemoryPerBlock":1024,"smClockRateKHz":1980000,"smCountOrigin":0,"supportCoopLaunch":1,
"totalGlobalMem":150000000000,"warpSize":32}"#;

/// cuDNN, if the dynamic linker finds this file.
fn found(file: &str) -> Option<&'static Library> {
    match Library::open(&[file]) {
        Ok(library) => {
            println!("cuDNN {}", dotted(library.version));
            Some(library)
        }
        Err(why) => {
            println!("not looked at: {why}");
            None
        }
    }
}

/// Whether cuDNN finds what it compiles kernels with.
fn compiles() -> bool {
    // SAFETY: NVRTC's initialisation asks for nothing.
    #[expect(unsafe_code, reason = "a library is opened")]
    ["libnvrtc.so.13", "libnvrtc.so.12"].iter().any(|file| unsafe { libloading::Library::new(*file) }.is_ok())
}

/// FLUX.1's at 1024 x 1024, views of one row for q, k and v, and odd lengths.
fn problems() -> Vec<attention::Problem> {
    let packed = |b, h, l, l_kv, e, bf16| {
        let of = |l: usize| [h * l * e, l * e, e];
        attention::Problem { b, h, l, l_kv, e, strides: [of(l), of(l_kv), of(l_kv)], row: h * e, bf16 }
    };
    let row = 3 * 3072 + 12288;
    let views =
        attention::Problem { strides: [[4608 * row, 128, row]; 3], row: 3072 + 12288, ..packed(1, 24, 4608, 4608, 128, true) };
    vec![packed(1, 24, 4608, 4608, 128, true), views, packed(2, 3, 77, 129, 64, false), packed(1, 1, 1, 1, 64, true)]
}

fn convolutions() -> Vec<convolution::Problem> {
    let problem = |[b, height, width, c]: [usize; 4], o: usize, window: Window, residual: bool| {
        let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::BF16, &Device::Cpu).unwrap();
        let (rows, columns) = (height / window.stride, width / window.stride);
        let (x, w, bias) = (zeros(&[b, height, width, c]), zeros(&[o, 3, 3, c]), zeros(&[o]));
        let other = residual.then(|| zeros(&[b, rows, columns, o]));
        convolution::Problem::of([&x, &w, &bias], other.as_ref(), window, [b, rows, columns, o]).unwrap().unwrap()
    };
    vec![
        problem([1, 128, 128, 512], 512, Window::SAME, true),
        problem([1, 64, 64, 256], 128, Window::SAME, false),
        problem([1, 64, 64, 128], 128, Window::HALVE, false),
        problem([2, 17, 9, 16], 512, Window::SAME, false),
    ]
}

/// All that is put to the library, each with what it is called.
fn graphs(library: &'static Library) -> Vec<(String, Result<Operations, Failure>)> {
    let forms = [Form::Whole, Form::Pieces].into_iter().filter(|form| form.is_in(library.version));
    let attentions = forms.flat_map(|form| {
        problems().into_iter().map(move |problem| (format!("{form:?} of {problem:?}"), problem.operations(library, form)))
    });
    let convolutions = convolutions().into_iter().map(|problem| (format!("{problem:?}"), problem.operations(library)));
    attentions.chain(convolutions).collect()
}

#[test]
fn cudnn_accepts_the_graphs() {
    let Some(library) = found("libcudnn.so.9") else { return };
    for (name, operations) in graphs(library) {
        match operations {
            Ok(_) => println!("{name}"),
            // Some versions do not begin without a driver's library.
            Err(why) if why.to_string().contains("SUBLIBRARY_LOADING_FAILED") => return println!("not looked at: {why}"),
            Err(why) => panic!("{name}: {why}"),
        }
    }
    // That it accepts them means something.
    let bare = Descriptor::new(library, descriptor::TENSOR, &[]).unwrap_err();
    assert!(!bare.is_of_the_card() && bare.to_string().contains("CUDNN_STATUS_BAD_PARAM"), "{bare}");
}

#[test]
fn cudnn_has_plans_for_hopper() {
    let Some(library) = found("libcudnn.so.9") else { return };
    let device = match Descriptor::new(library, descriptor::DEVICE, &[(attribute::DEVICE_JSON, Value::Text(H200))]) {
        Ok(device) => device,
        // Before 9.8, or without a driver's library.
        Err(why) => return println!("not looked at: {why}"),
    };
    if !compiles() {
        return println!("not looked at: there is no NVRTC");
    }
    let mut notes = Vec::new();
    for (name, operations) in graphs(library) {
        match Plan::of(operations.unwrap(), Target::Described(&[&device]), heuristics::A, usize::MAX) {
            Ok(plan) => {
                println!("{name}: workspace of {} bytes, notes {:?}", plan.workspace, plan.notes);
                notes.push(plan.notes.clone());
                let pack = plan.pack(&[(1, 16), (2, 32), (3, 48), (4, 64), (5, 80)], 256);
                assert!(pack.is_ok(), "{pack:?}");
            }
            // The kernel has been compiled, and there is no card to load it onto.
            Err(why) => assert!(why.is_of_the_card() && why.to_string().contains("EXECUTION_FAILED"), "{name}: {why}"),
        }
    }
    // That nothing is said against them means something, as other things are said of them.
    assert!(notes.is_empty() || notes.iter().any(|notes| notes.contains(&note::MATRIX_UNITS)), "{notes:?}");
}

#[test]
fn problems_of_tensors() {
    let zeros = |shape: &[usize], dtype| Tensor::zeros(shape, dtype, &Device::Cpu).unwrap();
    let bf16 = |shape: &[usize]| zeros(shape, DType::BF16);
    let of = |q: &Tensor, k: &Tensor| attention::Problem::of(q, k, k, None).unwrap();

    let (q, k) = (bf16(&[2, 3, 5, 64]), bf16(&[2, 3, 7, 64]));
    let strides = [[960, 320, 64], [1344, 448, 64], [1344, 448, 64]];
    assert_eq!(of(&q, &k), Some(attention::Problem { b: 2, h: 3, l: 5, l_kv: 7, e: 64, strides, row: 192, bf16: true }));
    // Heads side by side, as parts of a wider row.
    let row = bf16(&[1, 5, 3 * 128]);
    let part = |i: usize| row.narrow(2, i * 128, 128).unwrap().reshape((1, 5, 2, 64)).unwrap().transpose(1, 2).unwrap();
    let problem = of(&part(0), &part(1)).unwrap();
    assert_eq!(problem.strides[0][1], 64);

    let strided = row.narrow(2, 128, 128).unwrap().unsqueeze(0).unwrap();
    assert_eq!(
        of(&strided, &strided).unwrap().strides,
        [[1920, 1920, 384]; 3],
        "a dimension of one gets a stride that means something"
    );

    let no = [
        (bf16(&[1, 1, 5, 32]), "width"),
        (zeros(&[1, 1, 5, 64], DType::F32), "type"),
        (bf16(&[1, 1, 5, 68]).narrow(3, 0, 64).unwrap(), "rows that are not in eights"),
        (bf16(&[1, 1, 5, 72]).narrow(3, 4, 64).unwrap(), "a beginning that is not in eights"),
        (bf16(&[1, 1, 64, 5]).transpose(2, 3).unwrap(), "columns"),
        (bf16(&[1, 1, 1, 64]).broadcast_as((1, 1, 5, 64)).unwrap(), "repeated values"),
    ];
    for (x, what) in no {
        assert_eq!(of(&x, &x), None, "{what}");
    }
    assert_eq!(of(&q, &bf16(&[2, 3, 7, 128])), None, "widths");
    assert_eq!(of(&q, &bf16(&[2, 1, 7, 64])), None, "heads");
}
