//! `ckpt` itself, built as a part of this package so that its tests are given the path of the binary.

fn main() -> std::process::ExitCode {
    ckpt_cli::main()
}
