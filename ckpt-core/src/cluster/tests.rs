//! One row for each environment that users bring.

use proptest::prelude::*;

use super::{ClusterEnv, Launcher, slurm};
use crate::error::{ErrorKind, Result};

fn detect(variables: &[(&str, &str)]) -> Result<ClusterEnv> {
    ClusterEnv::detect(&|name| {
        variables.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned())
    })
}

/// launcher, rank, world, local rank, local world, hub, job, single host
type Row = (Launcher, u32, u32, u32, Option<u32>, &'static str, &'static str, bool);

fn row(variables: &[(&str, &str)]) -> (Launcher, u32, u32, u32, Option<u32>, String, String, bool) {
    let e = detect(variables).unwrap();
    let single = e.is_single_host();
    (e.launcher, e.rank, e.world_size, e.local_rank, e.local_world_size, e.hub.to_string(), e.job, single)
}

#[track_caller]
fn check(variables: &[(&str, &str)], (l, r, w, lr, lw, hub, job, single): Row) {
    assert_eq!(row(variables), (l, r, w, lr, lw, hub.to_owned(), job.to_owned(), single));
}

#[test]
fn torchrun() {
    use Launcher::Torchrun;
    let base = [
        ("RANK", "9"),
        ("WORLD_SIZE", "16"),
        ("LOCAL_RANK", "1"),
        ("LOCAL_WORLD_SIZE", "8"),
        ("MASTER_ADDR", "node0"),
        ("MASTER_PORT", "29500"),
    ];
    check(&base, (Torchrun, 9, 16, 1, Some(8), "node0:29501", "default", false));
    let named = [&base[..], &[("TORCHELASTIC_RUN_ID", "run7")]].concat();
    check(&named, (Torchrun, 9, 16, 1, Some(8), "node0:29501", "run7", false));
    let unnamed = [&base[..], &[("TORCHELASTIC_RUN_ID", "none"), ("SLURM_JOB_ID", "44")]].concat();
    check(&unnamed, (Torchrun, 9, 16, 1, Some(8), "node0:29501", "44", false));
    let ours = [&named[..], &[("CKPT_JOB", "mine"), ("CKPT_HUB_ADDRESS", "[fd00::1]:7000")]].concat();
    check(&ours, (Torchrun, 9, 16, 1, Some(8), "[fd00::1]:7000", "mine", false));
    // The inner launcher decides.
    let inside =
        [&base[..], &[("SLURM_PROCID", "3"), ("SLURM_NTASKS", "4"), ("OMPI_COMM_WORLD_RANK", "x")]].concat();
    check(&inside, (Torchrun, 9, 16, 1, Some(8), "node0:29501", "default", false));
    // Local ranks by arithmetic, or unknown.
    let bare = [("RANK", "5"), ("WORLD_SIZE", "8"), ("MASTER_ADDR", "::1"), ("MASTER_PORT", "1")];
    check(&bare, (Torchrun, 5, 8, 5, None, "[::1]:2", "default", true));
    let sized = [&bare[..], &[("LOCAL_WORLD_SIZE", "4")]].concat();
    check(&sized, (Torchrun, 5, 8, 1, Some(4), "[::1]:2", "default", true));
    // One rank needs no master; blanks are no values.
    let alone = [("RANK", " 0 "), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "")];
    check(&alone, (Torchrun, 0, 1, 0, None, "127.0.0.1:0", "default", true));
    // All ranks on one host that has a real name.
    let one = [&base[..1], &[("WORLD_SIZE", "16"), ("LOCAL_WORLD_SIZE", "16")], &base[4..]].concat();
    check(&one, (Torchrun, 9, 16, 9, Some(16), "node0:29501", "default", true));
}

#[test]
fn open_mpi() {
    use Launcher::OpenMpi;
    let base = [
        ("OMPI_COMM_WORLD_RANK", "3"),
        ("OMPI_COMM_WORLD_SIZE", "4"),
        ("OMPI_COMM_WORLD_LOCAL_RANK", "3"),
        ("OMPI_COMM_WORLD_LOCAL_SIZE", "4"),
        ("PMIX_NAMESPACE", "prterun-host-77@1"),
        ("SLURM_PROCID", "0"),
        ("SLURM_NTASKS", "4"),
    ];
    check(&base, (OpenMpi, 3, 4, 3, Some(4), "127.0.0.1:29501", "prterun-host-77@1", true));
    let placed =
        [&base[..], &[("MASTER_ADDR", "a"), ("MASTER_PORT", "5000"), ("SLURM_JOB_ID", "9")]].concat();
    check(&placed, (OpenMpi, 3, 4, 3, Some(4), "a:5001", "9", true));
    let two =
        [("OMPI_COMM_WORLD_RANK", "3"), ("OMPI_COMM_WORLD_SIZE", "4"), ("OMPI_COMM_WORLD_LOCAL_SIZE", "2")];
    let error = detect(&two).unwrap_err().to_string();
    assert!(error.contains("MASTER_ADDR") && error.contains("mpirun -x"), "{error}");
    let two = [&two[..], &[("MASTER_ADDR", "a")]].concat();
    check(&two, (OpenMpi, 3, 4, 1, Some(2), "a:29501", "default", false));
}

#[test]
fn slurm_tasks() {
    use Launcher::Slurm;
    let base = [
        ("SLURM_PROCID", "5"),
        ("SLURM_NTASKS", "8"),
        ("SLURM_LOCALID", "1"),
        ("SLURM_NODEID", "1"),
        ("SLURM_STEP_ID", "0"),
        ("SLURM_STEP_TASKS_PER_NODE", "4(x2)"),
        ("SLURM_STEP_NUM_NODES", "2"),
        ("SLURM_STEP_NODELIST", "gpu[07-08]"),
        ("SLURM_JOB_NODELIST", "gpu[01-08]"),
        ("SLURM_LAUNCH_NODE_IPADDR", "10.0.0.99"),
        ("SLURM_JOB_ID", "123456"),
    ];
    check(&base, (Slurm, 5, 8, 1, Some(4), "gpu07:26913", "123456", false));
    let ported = [&base[..], &[("MASTER_PORT", "6000")]].concat();
    check(&ported, (Slurm, 5, 8, 1, Some(4), "gpu07:6001", "123456", false));
    let launch_node = [&base[..5], &base[9..]].concat();
    check(&launch_node, (Slurm, 5, 8, 1, None, "10.0.0.99:26913", "123456", false));
    let one_node = [&base[..5], &[("SLURM_NNODES", "1")]].concat();
    check(&one_node, (Slurm, 5, 8, 1, Some(8), "127.0.0.1:29501", "default", true));
    let smaller_step = [&base[..], &[("SLURM_STEP_NUM_TASKS", "6")]].concat();
    check(&smaller_step, (Slurm, 5, 6, 1, Some(4), "gpu07:26913", "123456", false));
    // A batch script or an interactive shell is one process, whatever was allocated.
    let batch = [("SLURM_PROCID", "0"), ("SLURM_NTASKS", "8"), ("SLURM_STEP_ID", "4294967291")];
    check(&batch, (Launcher::Single, 0, 1, 0, Some(1), "127.0.0.1:0", "default", true));
    let error = detect(&base[..3]).unwrap_err().to_string();
    assert!(error.contains("MASTER_ADDR"), "{error}");
    let alone = [("SLURM_PROCID", "0"), ("SLURM_NTASKS", "1")];
    check(&alone, (Slurm, 0, 1, 0, None, "127.0.0.1:0", "default", true));
}

#[test]
fn a_single_process() {
    check(&[], (Launcher::Single, 0, 1, 0, Some(1), "127.0.0.1:0", "default", true));
    // Left over in many shells; says nothing about ranks.
    let leftover = [("MASTER_ADDR", "node7"), ("MASTER_PORT", "29500"), ("CKPT_JOB", "j")];
    check(&leftover, (Launcher::Single, 0, 1, 0, Some(1), "127.0.0.1:0", "j", true));
}

#[test]
fn half_set_and_contradictory_variables_are_one_line_that_names_them() {
    let master = [("MASTER_ADDR", "a"), ("MASTER_PORT", "29500")];
    let with_master = |more: &[(&'static str, &'static str)]| [&master[..], more].concat();
    type BadRow<'a> = (Vec<(&'a str, &'a str)>, &'a [&'a str]);
    let rows: Vec<BadRow<'_>> = vec![
        (with_master(&[("RANK", "0")]), &["WORLD_SIZE", "RANK"]),
        (with_master(&[("WORLD_SIZE", "2")]), &["WORLD_SIZE", "RANK"]),
        (with_master(&[("RANK", "2"), ("WORLD_SIZE", "2")]), &["RANK=2", "WORLD_SIZE=2"]),
        (with_master(&[("RANK", "0"), ("WORLD_SIZE", "0")]), &["WORLD_SIZE is 0"]),
        (with_master(&[("RANK", "-1"), ("WORLD_SIZE", "2")]), &["RANK=\"-1\""]),
        (with_master(&[("RANK", "1"), ("WORLD_SIZE", "two")]), &["WORLD_SIZE=\"two\""]),
        (
            with_master(&[
                ("RANK", "3"),
                ("WORLD_SIZE", "4"),
                ("LOCAL_RANK", "2"),
                ("LOCAL_WORLD_SIZE", "2"),
            ]),
            &["LOCAL_RANK=2", "LOCAL_WORLD_SIZE=2"],
        ),
        (
            with_master(&[("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_WORLD_SIZE", "4")]),
            &["LOCAL_WORLD_SIZE=4"],
        ),
        (
            with_master(&[("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")]),
            &["LOCAL_RANK=1", "RANK=0"],
        ),
        (vec![("RANK", "0"), ("WORLD_SIZE", "2")], &["MASTER_ADDR"]),
        (vec![("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "a")], &["MASTER_PORT"]),
        (
            vec![("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "a"), ("MASTER_PORT", "0")],
            &["MASTER_PORT"],
        ),
        (
            vec![("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "a"), ("MASTER_PORT", "65535")],
            &["65534"],
        ),
        (vec![("LOCAL_RANK", "0")], &["RANK and WORLD_SIZE", "LOCAL_RANK"]),
        (vec![("OMPI_COMM_WORLD_SIZE", "2")], &["OMPI_COMM_WORLD_RANK"]),
        (vec![("SLURM_PROCID", "2")], &["SLURM_NTASKS"]),
        (vec![("SLURM_PROCID", "9"), ("SLURM_NTASKS", "8"), ("SLURM_NNODES", "1")], &["SLURM_PROCID=9"]),
        (vec![("CKPT_HUB_ADDRESS", "node1")], &["CKPT_HUB_ADDRESS", "host:port"]),
    ];
    for (variables, words) in rows {
        let error = detect(&variables).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConfigInvalid);
        let text = error.to_string();
        assert!(!text.contains('\n'), "{text}");
        for word in words {
            assert!(text.contains(word), "{variables:?} gave {text:?} without {word:?}");
        }
    }
}

#[test]
fn node_lists() {
    for (list, first) in [
        ("node1", "node1"),
        ("gpu[03-05,9],login1", "gpu03"),
        ("a,b", "a"),
        ("rack[2,4]n[7-9]-ib", "rack2n7-ib"),
        ("n[5]", "n5"),
    ] {
        assert_eq!(slurm::first_host(list).as_deref(), Some(first), "{list}");
    }
    for list in ["", ",b", "n[1-2"] {
        assert_eq!(slurm::first_host(list), None, "{list}");
    }
    for (node, tasks) in [(0, Some(4)), (1, Some(4)), (2, Some(3)), (3, None)] {
        assert_eq!(slurm::tasks_of_node("4(x2),3", node), tasks);
    }
    assert_eq!(slurm::tasks_of_node("4(x", 0), None);
}

proptest! {
    #[test]
    fn any_environment_ends_in_a_place_or_one_line(
        values in proptest::collection::vec(proptest::option::of("[0-9]{1,6}|[a-z\\[\\],:-]{0,6}"), 16)
    ) {
        let names = [
            "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
            "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NNODES", "SLURM_STEP_NODELIST",
            "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "SLURM_NODEID",
            "SLURM_STEP_TASKS_PER_NODE",
        ];
        let found = ClusterEnv::detect(&|name| {
            let index = names.iter().position(|n| *n == name)?;
            values[index].clone()
        });
        match found {
            Ok(place) => prop_assert!(place.rank < place.world_size && place.local_rank <= place.rank),
            Err(error) => prop_assert!(!error.to_string().contains('\n')),
        }
    }
}
