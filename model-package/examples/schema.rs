//! Prints the JSON schema of `report.json`; `cargo xtask crds` writes it to `docs/`.

fn main() {
    println!("{:#}", plimsoll_package::report::schema::schema());
}
