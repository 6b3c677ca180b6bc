//! Sources: which files and tensors are taken, and what is refused with which words.
#![allow(clippy::unwrap_used, reason = "a test ends at the first surprise")]

mod checkpoint_support;

use std::{fs, path::Path};

use checkpoint_support::{meta, varied, write};
use ckpt_core::{
    DType, ErrorKind, Key,
    checkpoint::{
        CheckpointSource, Difference, HostMemory, NamedTensor, compare, generate, save_checkpoint,
        write_safetensors,
    },
    device::BufferSlice,
};
use tempfile::tempdir;

fn names(source: &CheckpointSource) -> Vec<String> {
    source.tensors().iter().map(|t| t.meta.name.to_string()).collect()
}

fn index(folder: &Path, text: &str) {
    fs::write(folder.join("model.safetensors.index.json"), text).unwrap();
}

#[test]
fn one_file_holds_every_dtype() {
    let dir = tempdir().unwrap();
    let path = write(&dir.path().join("m.safetensors"), &varied("a"), 3);
    let source = CheckpointSource::open(&path).unwrap();
    assert!(compare(&CheckpointSource::generated(varied("a"), 3), &source).unwrap().is_equal());
    let other = compare(&CheckpointSource::generated(varied("a"), 4), &source).unwrap();
    assert!(matches!(other.first_difference, Some(Difference::Bytes { .. })), "{other:?}");
    assert_eq!(other.equal_bytes, 0, "another seed changes every tensor that has bytes");
}

#[test]
fn a_folder_without_an_index_gives_all_its_files_by_name() {
    let dir = tempdir().unwrap();
    write(&dir.path().join("b.safetensors"), &[meta("y", DType::U8, &[3])], 1);
    write(&dir.path().join("a.safetensors"), &[meta("x", DType::U8, &[3])], 1);
    fs::write(dir.path().join("c.safetensors"), b"").unwrap();
    fs::write(dir.path().join("._a.safetensors"), b"junk").unwrap();
    fs::write(dir.path().join("config.json"), b"{}").unwrap();
    let source = CheckpointSource::open(dir.path()).unwrap();
    assert_eq!(names(&source), ["x", "y"]);
    assert_eq!(source.paths().count(), 3);
}

#[test]
fn symlinks_are_followed() {
    let dir = tempdir().unwrap();
    let blobs = tempdir().unwrap();
    let blob = write(&blobs.path().join("0123abcd"), &[meta("x", DType::U8, &[3])], 1);
    std::os::unix::fs::symlink(blob, dir.path().join("model.safetensors")).unwrap();
    assert_eq!(names(&CheckpointSource::open(dir.path()).unwrap()), ["x"]);
}

#[test]
fn an_index_decides_which_files_and_which_copy() {
    let dir = tempdir().unwrap();
    write(
        &dir.path().join("1.safetensors"),
        &[meta("x", DType::U8, &[3]), meta("extra", DType::U8, &[1])],
        1,
    );
    write(&dir.path().join("2.safetensors"), &[meta("x", DType::U8, &[4]), meta("y", DType::U8, &[4])], 1);
    write(&dir.path().join("consolidated.safetensors"), &[meta("x", DType::U8, &[5])], 1);
    index(dir.path(), r#"{"metadata":{},"weight_map":{"y":"2.safetensors","x":"1.safetensors"}}"#);
    let source = CheckpointSource::open(dir.path()).unwrap();
    assert_eq!(names(&source), ["extra", "x", "y"]);
    assert_eq!(*source.tensors()[1].meta.shape, [3]);
}

#[test]
fn a_wrong_index_is_an_error_that_names_file_and_tensor() {
    let dir = tempdir().unwrap();
    write(&dir.path().join("1.safetensors"), &[meta("x", DType::U8, &[3])], 1);
    let open = || CheckpointSource::open(dir.path()).unwrap_err();

    index(dir.path(), r#"{"weight_map":{"x":"1.safetensors","y":"2.safetensors"}}"#);
    let error = open();
    assert!(error.get(Key::Path).unwrap().ends_with("2.safetensors"), "{error}");

    index(dir.path(), r#"{"weight_map":{"x":"1.safetensors","y":"1.safetensors"}}"#);
    let error = open();
    assert_eq!(error.get(Key::Tensor), Some("y"));
    assert!(error.get(Key::Path).unwrap().ends_with("1.safetensors"), "{error}");

    for text in ["", "{}", "[]", r#"{"weight_map":{"x":3}}"#] {
        index(dir.path(), text);
        assert_eq!(open().kind(), ErrorKind::Corrupt, "{text}");
    }
    for name in ["../1.safetensors", "/etc/passwd", "", "."] {
        index(dir.path(), &format!(r#"{{"weight_map":{{"x":"{name}"}}}}"#));
        assert!(open().message().contains("inside the folder"), "{name}");
    }
    let unlisted = [meta("x", DType::U8, &[1]), meta("z", DType::U8, &[1])];
    write(&dir.path().join("1.safetensors"), &unlisted, 1);
    write(&dir.path().join("2.safetensors"), &[meta("y", DType::U8, &[1]), meta("z", DType::U8, &[1])], 1);
    index(dir.path(), r#"{"weight_map":{"x":"1.safetensors","y":"2.safetensors"}}"#);
    assert_eq!(open().get(Key::Tensor), Some("z"));
}

#[test]
fn a_name_in_two_files_names_both() {
    let dir = tempdir().unwrap();
    let a = write(&dir.path().join("a.safetensors"), &[meta("x", DType::U8, &[3])], 1);
    let b = write(&dir.path().join("b.safetensors"), &[meta("x", DType::U8, &[3])], 1);
    for error in [
        CheckpointSource::open(dir.path()).unwrap_err(),
        CheckpointSource::open_files(&[&a, &b]).unwrap_err(),
    ] {
        let text = error.to_string();
        assert!(
            text.contains("a.safetensors") && text.contains("b.safetensors") && text.contains("tensor=x"),
            "{text}"
        );
    }
}

#[test]
fn other_formats_are_refused_with_a_hint() {
    let dir = tempdir().unwrap();
    for name in ["w.npy", "w.meta", "pytorch_model.bin", "w.pt", "w.PTH", "w.gguf"] {
        let path = dir.path().join(name);
        fs::write(&path, b"x").unwrap();
        let error = CheckpointSource::open(&path).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        assert!(error.message().contains("safetensors") && !error.message().contains('\n'), "{error}");
    }
    assert_eq!(CheckpointSource::open(dir.path()).unwrap_err().kind(), ErrorKind::Unsupported);
    let empty = tempdir().unwrap();
    let error = CheckpointSource::open(empty.path()).unwrap_err();
    assert!(error.message().contains("neither"), "{error}");
    let error = CheckpointSource::open(empty.path().join("nowhere")).unwrap_err();
    assert!(error.get(Key::Path).unwrap().ends_with("nowhere"));
    let error = CheckpointSource::open("/dev/null").unwrap_err();
    assert!(error.message().contains("regular file"), "{error}");
}

#[test]
fn named_tensors_win_over_files() {
    let dir = tempdir().unwrap();
    let path = write(
        &dir.path().join("m.safetensors"),
        &[meta("x", DType::U8, &[3]), meta("y", DType::U8, &[3])],
        1,
    );
    let named = NamedTensor::from_slice(meta("x", DType::U8, &[2]), &[7, 8]).unwrap();
    let source = CheckpointSource::open(&path).unwrap().with_tensors([named.clone()]).unwrap();
    assert_eq!(names(&source), ["y", "x"]);
    assert_eq!(source.read(1).unwrap(), [7, 8]);
    let error = CheckpointSource::from_tensors([named.clone(), named]).unwrap_err();
    assert_eq!(error.get(Key::Tensor), Some("x"));
    let error = NamedTensor::from_slice(meta("x", DType::F32, &[2]), &[7, 8]).unwrap_err();
    assert!(error.message().contains("8 bytes, 2"), "{error}");
    let memory = BufferSlice::whole(std::sync::Arc::new(HostMemory::allocate(16).unwrap()));
    let lent = NamedTensor::from_buffer(meta("z", DType::U8, &[4]), memory.slice(4..8).unwrap()).unwrap();
    assert_eq!(CheckpointSource::from_tensors([lent]).unwrap().read(0).unwrap(), [0; 4]);
}

#[test]
fn a_file_that_changed_after_opening_is_noticed() {
    let dir = tempdir().unwrap();
    let path = write(&dir.path().join("m.safetensors"), &[meta("x", DType::U8, &[100])], 1);
    let source = CheckpointSource::open(&path).unwrap();
    write(&path, &[meta("x", DType::U8, &[100])], 2);
    let error = source.read(0).unwrap_err();
    assert!(error.message().contains("changed"), "{error}");
    assert_eq!(error.get(Key::Path), path.to_str());
}

#[test]
fn written_files_do_not_depend_on_the_order_and_appear_whole() {
    let dir = tempdir().unwrap();
    let mut metas = varied("a");
    let first = write(&dir.path().join("1.safetensors"), &metas, 1);
    metas.reverse();
    let second = write(&dir.path().join("2.safetensors"), &metas, 1);
    assert!(fs::read(first).unwrap() == fs::read(&second).unwrap());
    let duplicate = meta("x", DType::U8, &[1]);
    let error = write_safetensors(&second, [(&duplicate, &[1][..]), (&duplicate, &[1][..])]).unwrap_err();
    assert_eq!(error.get(Key::Tensor), Some("x"));
    assert!(write_safetensors(&second, [(&duplicate, &[][..])]).is_err());
    let error =
        write_safetensors(dir.path().join("no/such/m.safetensors"), [(&duplicate, &[1][..])]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConfigInvalid);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2, "no temporary files are left");
}

#[test]
fn a_saved_checkpoint_opens_again() {
    let dir = tempdir().unwrap();
    let source = CheckpointSource::generated(generate::qwen_shaped(3 << 20), 5);
    let files = save_checkpoint(&source, dir.path(), 1 << 20).unwrap();
    assert!(files.len() >= 3, "{files:?}");
    let opened = CheckpointSource::open(dir.path()).unwrap();
    let comparison = compare(&source, &opened).unwrap();
    assert!(comparison.is_equal(), "{comparison:?}");
    assert_eq!(
        (comparison.equal_tensors, comparison.equal_bytes),
        (source.tensors().len(), source.len_bytes())
    );
}

#[test]
fn differences_are_named() {
    let tensor = |name: &str, shape: &[u64], bytes: &[u8]| {
        NamedTensor::from_slice(meta(name, DType::U8, shape), bytes).unwrap()
    };
    let source = |tensors: &[NamedTensor]| CheckpointSource::from_tensors(tensors.iter().cloned()).unwrap();
    let expected = source(&[tensor("a", &[2], &[1, 2]), tensor("b", &[2], &[3, 4])]);
    let say = |actual: &[NamedTensor]| {
        let comparison = compare(&expected, &source(actual)).unwrap();
        (comparison.different_tensors, comparison.first_difference.map(|d| d.to_string()).unwrap_or_default())
    };
    assert_eq!(say(&[tensor("b", &[2], &[3, 4]), tensor("a", &[2], &[1, 2])]), (0, String::new()));
    assert_eq!(say(&[tensor("b", &[2], &[3, 4])]), (1, "tensor a is missing".into()));
    let (count, text) =
        say(&[tensor("a", &[2], &[1, 2]), tensor("b", &[2], &[3, 5]), tensor("c", &[0], &[])]);
    assert_eq!(count, 2);
    assert_eq!(text, "tensor b (torch.uint8 [2]) differs at byte 1 of 2: should be 0x04, is 0x05");
    let (_, text) = say(&[tensor("a", &[1, 2], &[1, 2]), tensor("b", &[2], &[3, 4])]);
    assert_eq!(text, "tensor a should be torch.uint8 [2], is torch.uint8 [1, 2]");
}
