//! What can be looked at without a card: whether cuDNN, where it is installed, accepts the graphs, and makes plans for a card that is
//! only described to it.

#![allow(clippy::print_stdout, reason = "tests say what they could not look at")]

use candle_core::{DType, Device, Tensor};

use super::backend::{Descriptor, Library, Value, dotted};
use super::codes::{attribute, descriptor, heuristics};
use super::graph::{Form, Operations, Plan, Problem, Target};

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
fn problems() -> Vec<Problem> {
    let packed = |b, h, l, l_kv, e, bf16| {
        let of = |l: usize| [h * l * e, l * e, e];
        Problem { b, h, l, l_kv, e, strides: [of(l), of(l_kv), of(l_kv)], row: h * e, bf16 }
    };
    let row = 3 * 3072 + 12288;
    let views = Problem { strides: [[4608 * row, 128, row]; 3], row: 3072 + 12288, ..packed(1, 24, 4608, 4608, 128, true) };
    vec![packed(1, 24, 4608, 4608, 128, true), views, packed(2, 3, 77, 129, 64, false), packed(1, 1, 1, 1, 64, true)]
}

#[test]
fn cudnn_accepts_both_forms() {
    let Some(library) = found("libcudnn.so.9") else { return };
    for form in Form::of(library.version) {
        for problem in problems() {
            match Operations::new(library, *form, &problem) {
                Ok(_) => println!("{form:?} of {problem:?}"),
                // Some versions do not begin without a driver's library.
                Err(why) if why.contains("SUBLIBRARY_LOADING_FAILED") => return println!("not looked at: {why}"),
                Err(why) => panic!("{form:?} of {problem:?}: {why}"),
            }
        }
    }
    // That it accepts them means something.
    let bare = Descriptor::new(library, descriptor::TENSOR, &[]).unwrap_err();
    assert!(bare.contains("CUDNN_STATUS_BAD_PARAM"), "{bare}");
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
    for form in Form::of(library.version) {
        for problem in problems() {
            match Plan::in_form(library, &problem, Target::Described(&[&device]), *form, heuristics::A) {
                Ok(plan) => {
                    println!("{form:?} of {problem:?}: workspace of {} bytes", plan.workspace);
                    let pack = plan.pack([16, 32, 48, 64, 80], 256);
                    assert!(pack.is_ok(), "{pack:?}");
                }
                // The kernel has been compiled, and there is no card to load it onto.
                Err(why) => assert!(why.contains("EXECUTION_FAILED"), "{form:?} of {problem:?}: {why}"),
            }
        }
    }
    let target = Target::Described(&[&device]);
    if let Ok(plan) = Plan::new(library, &problems()[0], target) {
        println!("first choice: workspace of {} bytes", plan.workspace);
    }
}

#[test]
fn problems_of_tensors() {
    let zeros = |shape: &[usize], dtype| Tensor::zeros(shape, dtype, &Device::Cpu).unwrap();
    let bf16 = |shape: &[usize]| zeros(shape, DType::BF16);
    let of = |q: &Tensor, k: &Tensor| Problem::of(q, k, k, None).unwrap();

    let (q, k) = (bf16(&[2, 3, 5, 64]), bf16(&[2, 3, 7, 64]));
    let strides = [[960, 320, 64], [1344, 448, 64], [1344, 448, 64]];
    assert_eq!(of(&q, &k), Some(Problem { b: 2, h: 3, l: 5, l_kv: 7, e: 64, strides, row: 192, bf16: true }));
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
