//! Links the server's program small, since the image has to stay so: identical functions are folded into one (tract and ndarray make many of
//! them, one for each type of the same size), and addresses to relocate are listed in brief, which glibc reads from 2.36 on. The linker
//! is the one that rustc brings for Linux on x86_64; others may not know the options.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    let of_target = |name: &str| std::env::var(name).unwrap_or_default();
    if of_target("CARGO_CFG_TARGET_OS") == "linux" && of_target("CARGO_CFG_TARGET_ARCH") == "x86_64" && of_target("PROFILE") == "release" {
        println!("cargo::rustc-link-arg-bins=-Wl,--icf=all");
        println!("cargo::rustc-link-arg-bins=-Wl,-z,pack-relative-relocs");
        // Cargo strips no package whose profile is its own. Whoever asks for debug information is about to profile.
        if of_target("DEBUG") != "true" {
            println!("cargo::rustc-link-arg-bins=-Wl,--strip-all");
        }
    }
}
