//! Metas: JSON as checkpoint-engine has it, the compact form, and what strangers may send.
#![allow(clippy::unwrap_used, reason = "a test ends at the first surprise")]

use std::{collections::BTreeMap, sync::Arc};

use bytes::Bytes;
use ckpt_core::{
    DType, ErrorKind, Key, Version,
    checkpoint::{DigestAlgorithm, Digests, generate},
    manifest::{Arena, Manifest, Share, Tensor},
    metas::{EncodedLayout, Extension, LayoutCache, Metas, Part, Placement, RankMetas},
    types::{TensorMeta, align_up},
};
use proptest::prelude::*;

fn share(metas: impl IntoIterator<Item = TensorMeta>) -> Share {
    let mut arena = Arena::default();
    for meta in metas {
        let offset = arena.len_bytes;
        arena.len_bytes += align_up(meta.len_bytes());
        arena.tensors.push(Tensor { meta, offset });
    }
    Share { arenas: vec![arena] }
}

fn meta(name: &str, dtype: DType, shape: &[u64]) -> TensorMeta {
    TensorMeta::new(name, dtype, shape).unwrap()
}

fn extension(tensors: usize) -> Extension {
    Extension {
        host: "node-1".into(),
        version: Version(7),
        generation: 3,
        digests: Some(Digests {
            algorithm: DigestAlgorithm::Xxh3_64,
            values: (0..tensors as u64).map(|i| u64::MAX - i).collect(),
        }),
        descriptors: BTreeMap::from([("tcp".to_owned(), Bytes::from_static(&[0, 0xab, 0xff]))]),
    }
}

fn placement(arenas: usize, extension: Option<Extension>) -> Placement {
    Placement {
        p2p_store_addr: Some("10.0.0.1:15428".into()),
        rdma_device: "mlx5_0,mlx5_1".into(),
        arena_addresses: (1..=arenas as u64).map(|i| i << 40).collect(),
        extension,
    }
}

fn one_rank(share: Share, extension: Option<Extension>) -> Metas {
    let placement = placement(share.arenas.len(), extension);
    Metas { ranks: BTreeMap::from([(0, RankMetas::new(Arc::new(share), placement).unwrap())]) }
}

#[test]
fn json_is_exactly_the_published_form() {
    let tensors =
        [meta("model.embed_tokens.weight", DType::BF16, &[151_936, 4096]), meta("s", DType::F32, &[])];
    let mut metas = one_rank(share(tensors), None);
    let rank = metas.ranks.get_mut(&0).unwrap();
    rank.placement.rdma_device = String::new();
    rank.placement.p2p_store_addr = None;
    let json = metas.to_json().unwrap();
    let expected = concat!(
        r#"{"0":{"p2p_store_addr":null,"rdma_device":"","memory_buffer_metas_list":[{"ptr":1099511627776,"#,
        r#""size":1244659968,"metas":[{"name":"model.embed_tokens.weight","dtype":"torch.bfloat16","#,
        r#""shape":[151936,4096],"aligned_size":1244659712},{"name":"s","dtype":"torch.float32","shape":[],"#,
        r#""aligned_size":256}]}]}}"#
    );
    assert_eq!(json, expected);
    assert_eq!(Metas::from_json(json.as_bytes()).unwrap(), metas);

    let with_ours = one_rank(share([meta("s", DType::F32, &[])]), Some(extension(1))).to_json().unwrap();
    let ours = concat!(
        r#","ckpt":{"format":1,"host":"node-1","version":7,"generation":3,"arenas":[1099511627776],"#,
        r#""digests":{"algorithm":"xxh3-64","values":["ffffffffffffffff"]},"descriptors":{"tcp":"00abff"}}}}"#
    );
    assert!(with_ours.ends_with(ours), "{with_ours}");
}

#[test]
fn a_peers_json_is_read() {
    let json = r#" { "3": {"p2p_store_addr": "10.0.0.1:15428", "rdma_device": "mlx5_0", "host_ip": "10.0.0.1",
        "memory_buffer_metas_list": [
          {"metas": [{"name": "b", "dtype": "torch.float8_e4m3fn", "shape": [3, 100], "aligned_size": 512},
                     {"name": "a\u00e9", "dtype": "torch.bfloat16", "shape": [1], "aligned_size": 2, "more": {}},
                     {"name": "c", "dtype": "torch.int64", "shape": [0, 4], "aligned_size": 0}],
           "ptr": 139872, "size": 1024}, {"ptr": 5, "size": 0, "metas": []}]} }"#;
    let metas = Metas::from_json(json.as_bytes()).unwrap();
    let rank = &metas.ranks[&3];
    assert_eq!(rank.placement.arena_addresses, [139_872, 5]);
    assert_eq!(rank.placement.extension, None);
    let places: Vec<_> = rank.share.tensors().map(|t| (&*t.meta.name, t.offset)).collect();
    assert_eq!(places, [("b", 0), ("aé", 512), ("c", 514)], "the order in memory is the order in the list");
    assert_eq!(rank.share.arenas[0].len_bytes, 1024);
    assert_eq!(rank.address(0, 512), Some(139_872 + 512));
    assert_eq!(metas.manifest().tensor_bytes(), 302);
}

#[test]
fn packed_pairs_have_torchs_shape() {
    let metas = one_rank(share([meta("t", DType::F4, &[3, 8])]), None);
    let json = metas.to_json().unwrap();
    assert!(json.contains(r#""dtype":"torch.float4_e2m1fn_x2","shape":[3,4]"#), "{json}");
    assert_eq!(Metas::from_json(json.as_bytes()).unwrap(), metas);
    let error = one_rank(share([meta("t", DType::F4, &[8, 3])]), None).to_json().unwrap_err();
    assert_eq!((error.kind(), error.get(Key::Tensor)), (ErrorKind::Unsupported, Some("t")));
}

#[test]
fn arenas_that_begin_with_a_files_header_keep_their_offsets() {
    let mut natural = Arena { len_bytes: 104 + 6 + 4, tensors: vec![] };
    natural.tensors.push(Tensor { meta: meta("x", DType::BF16, &[3]), offset: 104 });
    natural.tensors.push(Tensor { meta: meta("y", DType::U8, &[4]), offset: 110 });
    let metas = one_rank(Share { arenas: vec![natural] }, Some(extension(2)));
    let json = metas.to_json().unwrap();
    assert!(
        json.contains(r#""ptr":1099511627880,"size":10"#) && json.contains(r#""aligned_size":6"#),
        "{json}"
    );
    assert_eq!(Metas::from_json(json.as_bytes()).unwrap(), metas);
}

#[test]
fn hostile_json_is_an_error_that_says_why() {
    let tensor = |name: &str, dtype: &str, shape: &str, aligned: &str| {
        format!(r#"{{"name":"{name}","dtype":"{dtype}","shape":{shape},"aligned_size":{aligned}}}"#)
    };
    let buffer = |ptr: &str, size: &str, metas: &str| {
        let list = format!(r#"[{{"ptr":{ptr},"size":{size},"metas":[{metas}]}}]"#);
        format!(r#"{{"0":{{"p2p_store_addr":null,"rdma_device":"","memory_buffer_metas_list":{list}}}}}"#)
    };
    let good = tensor("t", "torch.bfloat16", "[2]", "256");
    let with_ckpt = |ckpt: &str| {
        let json = buffer("1000", "256", &good);
        format!(r#"{},"ckpt":{ckpt}}}}}"#, &json[..json.len() - 2])
    };
    assert!(Metas::from_json(buffer("1000", "256", &good).as_bytes()).is_ok());
    assert!(Metas::from_json(with_ckpt(r#"{"format":1,"arenas":[1000],"later":1}"#).as_bytes()).is_ok());
    let max = u64::MAX.to_string();
    let cases = [
        (String::new(), "EOF"),
        ("[]".into(), "invalid type"),
        (r#"{"-1":{}}"#.into(), "-1"),
        (r#"{"x":{}}"#.into(), "key"),
        (r#"{"0":{}}"#.into(), "rdma_device"),
        ("[".repeat(1 << 20), "line 1"),
        (buffer("-1", "256", &good), "-1"),
        (buffer("1000", "-256", &good), "-256"),
        (buffer("1000", "1e3", &good), "floating point"),
        (buffer("1000", "255", &good), "does not fit into its buffer of 255"),
        (buffer(&max, "256", &good), "do not exist"),
        (buffer("1000", &max, &good), "do not exist"),
        (buffer("1000", "256", &tensor("t", "torch.bfloat16", "[-2]", "256")), "-2"),
        (buffer("1000", "256", &tensor("t", "torch.bfloat16", "[200]", "256")), "less than the tensor's 400"),
        (buffer("1000", "256", &tensor("t", "torch.bfloat16", "[2]", "-1")), "-1"),
        (buffer("1000", "256", &tensor("t", "torch.bfloat16", "[2]", &max)), "does not fit"),
        (buffer("1000", "256", &tensor("t", "torch.bfloat17", "[2]", "256")), "bfloat17"),
        (buffer("1000", "256", &tensor("t", "torch.bfloat16", "[4294967296,4294967296]", "256")), "too many"),
        (buffer("1000", "512", &format!("{good},{good}")), "twice"),
        (with_ckpt("{}"), "format"),
        (with_ckpt(r#"{"format":2,"arenas":[1000]}"#), "format is 2"),
        (with_ckpt(r#"{"format":1}"#), "counts of buffers and of arenas"),
        (with_ckpt(r#"{"format":1,"arenas":[1001]}"#), "before its arena"),
        (with_ckpt(r#"{"format":1,"arenas":[1000],"descriptors":{"tcp":"0"}}"#), "hexadecimal"),
        (with_ckpt(r#"{"format":1,"arenas":[1000],"descriptors":{"tcp":"é"}}"#), "hexadecimal"),
        (
            with_ckpt(
                r#"{"format":1,"arenas":[1000],"digests":{"algorithm":"xxh3-64","values":["+fffffffffffffff"]}}"#,
            ),
            "16 hexadecimal digits",
        ),
        (
            with_ckpt(r#"{"format":1,"arenas":[1000],"digests":{"algorithm":"xxh3-64","values":[]}}"#),
            "1 tensors have 0 digests",
        ),
    ];
    for (json, words) in cases {
        let error = Metas::from_json(json.as_bytes()).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Unsupported), "{error}");
        assert!(error.to_string().contains(words), "{error} does not say {words:?}");
    }
    let wrong = buffer("1000", "256", &tensor("t", "torch.bfloat16", "[200]", "256"));
    let error = Metas::from_json(wrong.as_bytes()).unwrap_err();
    assert_eq!((error.get(Key::Rank), error.get(Key::Tensor)), (Some("0"), Some("t")));
    let unknown = with_ckpt(r#"{"format":1,"arenas":[1000],"digests":{"algorithm":"new","values":["?"]}}"#);
    let metas = Metas::from_json(unknown.as_bytes()).unwrap();
    assert_eq!(metas.ranks[&0].placement.extension.as_ref().unwrap().digests, None);
}

#[test]
fn a_layout_travels_once() {
    let share = share(generate::qwen_shaped(1 << 20));
    let layout = EncodedLayout::new(&share).unwrap();
    let placement = placement(1, Some(Extension { digests: None, ..extension(0) }));
    let mut cache = LayoutCache::default();
    let short = Part::without_layout(placement.clone(), &layout).encode().unwrap();
    assert!(short.len() < 150, "{}", short.len());
    let error = cache.resolve(Part::decode(&short).unwrap()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    let long = Part::with_layout(placement.clone(), &layout).encode().unwrap();
    let first = cache.resolve(Part::decode(&long).unwrap()).unwrap();
    assert_eq!(*first.share, share);
    let second = cache.resolve(Part::decode(&short).unwrap()).unwrap();
    assert!(Arc::ptr_eq(&first.share, &second.share));
    let metas = Metas { ranks: BTreeMap::from([(0, second)]) };
    cache.retain(&metas);
    assert!(cache.contains(layout.digest()));
    cache.retain(&Metas::default());
    assert!(!cache.contains(layout.digest()));

    let mut false_name = Part::decode(&long).unwrap();
    false_name.layout.0 ^= 1;
    assert_eq!(cache.resolve(false_name).unwrap_err().kind(), ErrorKind::Corrupt);
    assert_eq!(Part::decode(&[]).unwrap_err().kind(), ErrorKind::Corrupt);
    assert_eq!(Part::decode(&[9]).unwrap_err().kind(), ErrorKind::Unsupported);
    let mut tail = long.to_vec();
    tail.push(0);
    assert_eq!(Part::decode(&tail).unwrap_err().kind(), ErrorKind::Corrupt);
}

#[test]
fn kimi_k2_on_256_ranks_is_under_two_megabytes() {
    let tensors: Vec<TensorMeta> = generate::kimi_k2_shapes().collect();
    let mut ranks = BTreeMap::new();
    let parts = ckpt_core::checkpoint::split(tensors.iter().map(TensorMeta::len_bytes), 256).unwrap();
    for (rank, part) in (0..).zip(parts) {
        let share = Arc::new(share(tensors[part].iter().cloned()));
        let extension = Extension { digests: None, ..extension(0) };
        ranks.insert(rank, RankMetas::new(share, placement(1, Some(extension))).unwrap());
    }
    let metas = Metas { ranks };
    let bytes = metas.encode().unwrap();
    assert!(bytes.len() <= 2_000_000, "{}", bytes.len());
    assert_eq!(Metas::decode(&bytes).unwrap(), metas);
}

#[test]
fn halves_that_do_not_fit_are_refused() {
    let manifest = Manifest { shares: BTreeMap::from([(4, Arc::new(share([meta("x", DType::U8, &[1])])))]) };
    let error = Metas::new(&manifest, BTreeMap::new()).unwrap_err();
    assert_eq!(error.get(Key::Rank), Some("4"));
    let error = Metas::new(&manifest, BTreeMap::from([(4, placement(2, None))])).unwrap_err();
    assert!(error.message().contains("1 arenas have 2"), "{error}");
    let metas = Metas::new(&manifest, BTreeMap::from([(4, placement(1, None))])).unwrap();
    assert_eq!(metas.manifest(), manifest);
}

proptest! {
    #[test]
    fn both_forms_keep_everything(
        ranks in proptest::collection::btree_map(
            0_u32..1000,
            (proptest::collection::vec((0..DType::ALL.len(), 0_u64..100), 0..20), any::<bool>()),
            0..6,
        )
    ) {
        let mut metas = Metas::default();
        for (rank, (tensors, ours)) in ranks {
            let share = share(tensors.iter().enumerate().map(|(i, (dtype, n))| {
                meta(&format!("t.{i}"), DType::ALL[*dtype], &[*n, 8])
            }));
            let count = share.tensors().count();
            let placement = placement(1, ours.then(|| extension(count)));
            metas.ranks.insert(rank, RankMetas::new(Arc::new(share), placement).unwrap());
        }
        prop_assert_eq!(&Metas::from_json(metas.to_json().unwrap().as_bytes()).unwrap(), &metas);
        prop_assert_eq!(&Metas::decode(&metas.encode().unwrap()).unwrap(), &metas);
    }

    #[test]
    fn damage_never_panics(at: prop::sample::Index, flip in 1_u8..) {
        let metas = one_rank(share([meta("x", DType::U8, &[1]), meta("y", DType::F32, &[2, 3])]), Some(extension(2)));
        let mut compact = metas.encode().unwrap().to_vec();
        let i = at.index(compact.len());
        compact[i] ^= flip;
        let _ = Metas::decode(&compact);
        let mut json = metas.to_json().unwrap().into_bytes();
        let i = at.index(json.len());
        json[i] ^= flip;
        let _ = Metas::from_json(&json);
    }
}
