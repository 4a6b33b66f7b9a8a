//! `ferrotune doctor`

use crate::util::Dir;

#[test]
fn doctor_says_what_there_is() {
    let dir = Dir::new();
    let ran = dir.ferrotune(&["doctor"]).succeeds();
    for name in [
        "ferrotune ",
        "system ",
        "cpu ",
        "cores ",
        "memory ",
        "gpu ",
        "driver ",
        "libcublasLt",
        "model cache ",
        "training ",
    ] {
        assert!(
            ran.stdout.lines().any(|line| line.starts_with(name)),
            "`{name}` is missing:\n{}",
            ran.stdout
        );
    }
    let home = dir.path().join("home").join("models");
    assert!(ran.stdout.contains(&format!("{}, empty", home.display())), "{}", ran.stdout);
    assert_eq!(ran.stderr, "");
}
