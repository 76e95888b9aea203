//! Checks of the source tree that the compiler does not make: dependencies between modules, length
//! of files, text that must not be committed. `CONTRIBUTING.md` explains the rules.
//!
//! The checks read sources line by line. This relies on rustfmt: the last line of an item has the
//! same indentation as its first line.

#![expect(clippy::unwrap_used, reason = "helpers panic on failure, as tests do")]

#[path = "tidy/circles.rs"]
mod circles;
#[path = "tidy/prose.rs"]
mod prose;

use std::collections::BTreeSet;
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};

/// Maximum number of lines in a file, without its tests. A longer file has more than one subject.
const PRODUCTION_LINES_MAX: usize = 600;
const CORPUS_FILE_BYTES_MAX: u64 = 4 * 1024;
const CORPUS_FILES_MAX: usize = 64;

const DOCUMENTS: [&str; 5] = [
    "README.md",
    "ARCHITECTURE.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "LICENSE",
];

/// Modules that compute results from their arguments alone.
const PURE_MODULES: [&str; 7] = ["span", "h1", "json", "fleet", "api", "policy", "pd"];
/// Names that a pure module must not use, because they reach clocks, files, threads or sockets.
const IMPURE_NAMES: [&str; 9] = [
    "std::env",
    "std::fs",
    "std::process",
    "std::thread",
    "Instant",
    "SystemTime",
    "TcpStream",
    "UdpSocket",
    "tokio",
];

/// Crates, each with the only places that may name it.
const SEAMS: [(&str, &[&str]); 4] = [
    ("core_affinity::", &["src/sys/cores.rs"]),
    ("monoio::", &["src/net/monoio"]),
    ("serde_saphyr::", &["src/config/yaml.rs"]),
    (
        "io_uring::",
        &["src/net/reactor/uring.rs", "src/net/probe.rs"],
    ),
];

/// Leftovers of unfinished work. Each is written in two halves, so that this file passes.
const LEFTOVERS: [&str; 5] = [
    concat!("todo", "!("),
    concat!("unimplemented", "!("),
    concat!("FIX", "ME"),
    concat!("XX", "X"),
    concat!("#[ign", "ore"),
];
/// Directories that exist only on a developer's machine.
const MACHINE_PATHS: [&str; 4] = [
    concat!("/ro", "ot/"),
    concat!("/ho", "me/"),
    concat!("/Use", "rs/"),
    concat!("/wo", "rk/"),
];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Returns the files under `folder` as paths relative to the root, without build output and without
/// files that git ignores.
fn files(folder: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![root().join(folder)];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            let skipped = ["target", ".git", "artifacts", "found", "coverage"];
            if path.is_dir() {
                if !skipped.contains(&&*name) {
                    folders.push(path);
                }
            } else {
                found.push(path.strip_prefix(root()).unwrap().to_owned());
            }
        }
    }
    found.sort();
    found
}

fn has_extension(path: &Path, extensions: &[&str]) -> bool {
    path.extension()
        .is_some_and(|own| extensions.iter().any(|other| own == *other))
}

fn read(path: &Path) -> String {
    fs::read_to_string(root().join(path)).unwrap()
}

/// A source file of the library, reduced to the lines that are neither tests nor comments.
struct Source {
    path: PathBuf,
    /// The top-level module that contains it.
    module: String,
    /// Depth in the module tree: 1 for `h1/mod.rs`, 2 for `h1/head.rs`.
    depth: usize,
    /// Line numbers and lines.
    code: Vec<(usize, String)>,
    /// Number of lines without tests, including comments.
    production_lines: usize,
}

impl Source {
    fn is_under(&self, places: &[&str]) -> bool {
        places.iter().any(|place| self.path.starts_with(place))
    }
}

/// Returns the library's production sources, without files that contain only tests.
fn sources() -> Vec<Source> {
    let mut sources = Vec::new();
    let mut tests_only = BTreeSet::new();
    for path in files("src") {
        if !has_extension(&path, &["rs"]) || path.ends_with("src/main.rs") {
            continue;
        }
        let text = read(&path);
        let kept = without_tests(&text);
        for declared in &kept.test_modules {
            let folder = match path.file_stem().unwrap().to_str() {
                Some("mod" | "lib") => path.parent().unwrap().to_owned(),
                _ => path.with_extension(""),
            };
            // A `path` attribute puts the file in the same directory.
            tests_only.insert(folder.join(format!("{declared}.rs")));
            tests_only.insert(path.with_file_name(format!("{declared}.rs")));
        }
        let inside = path.strip_prefix("src").unwrap().with_extension("");
        let mut parts: Vec<_> = inside.iter().map(|part| part.to_string_lossy()).collect();
        if parts.last().is_some_and(|last| last == "mod") {
            parts.pop();
        }
        let code = kept.lines.iter().filter_map(|(number, line)| {
            let code = line.split("//").next().unwrap_or_default();
            (!code.trim().is_empty()).then(|| (*number, code.to_owned()))
        });
        sources.push(Source {
            module: parts[0].clone().into_owned(),
            depth: parts.len(),
            code: code.collect(),
            production_lines: kept.lines.len(),
            path,
        });
    }
    sources.retain(|source| {
        let name = source.path.to_string_lossy();
        !tests_only.contains(&source.path) && !name.ends_with("_tests.rs")
    });
    assert!(sources.len() > 20, "found fewer than 20 source files");
    sources
}

struct Kept<'a> {
    lines: Vec<(usize, &'a str)>,
    /// Names of test modules that are declared here and defined in separate files.
    test_modules: Vec<&'a str>,
}

/// Returns the lines of a source file without the items under `#[cfg(test)]`.
fn without_tests(text: &str) -> Kept<'_> {
    let mut kept = Kept {
        lines: Vec::new(),
        test_modules: Vec::new(),
    };
    let mut lines = text.lines().enumerate().map(|(i, line)| (i + 1, line));
    while let Some((number, line)) = lines.next() {
        if line.trim() != "#[cfg(test)]" {
            kept.lines.push((number, line));
            continue;
        }
        let indent = line.len() - line.trim_start().len();
        let item = lines.find(|(_, line)| !line.trim_start().starts_with("#["));
        let first = item.map_or("", |(_, line)| line.trim());
        if let Some(declared) = first.strip_suffix(';')
            && let Some((_, name)) = declared.split_once("mod ")
        {
            kept.test_modules.push(name);
        }
        if first.ends_with([';', '}', ',']) {
            continue;
        }
        // The item's last line is a closing bracket with the indentation of its first line, with
        // nothing opened after it.
        let _ = lines.find(|(_, line)| {
            let closes = line.get(indent..).is_some_and(|rest| {
                line[..indent].trim().is_empty() && rest.starts_with(['}', ']', ')'])
            });
            closes && line.ends_with(['}', ';', ','])
        });
    }
    kept
}

/// Returns the modules of `lib.rs` in declaration order.
fn modules() -> Vec<String> {
    let text = read(Path::new("src/lib.rs"));
    let declared = text.lines().filter_map(|line| {
        let (_, name) = line.strip_suffix(';')?.split_once("mod ")?;
        Some(name.to_owned())
    });
    declared.collect()
}

fn is_name_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_'
}

/// Returns the names that follow `prefix` in `code`, unless `prefix` is itself preceded by part of
/// a path.
fn names_after<'a>(code: &'a str, prefix: &str) -> Vec<&'a str> {
    let mut names = Vec::new();
    for (at, _) in code.match_indices(prefix) {
        let before = code[..at].bytes().next_back();
        if before.is_some_and(|byte| is_name_byte(byte) || byte == b':' || byte == b'$') {
            continue;
        }
        let rest = &code[at + prefix.len()..];
        let len = rest.bytes().take_while(|byte| is_name_byte(*byte)).count();
        names.push(&rest[..len]);
    }
    names
}

/// Panics with a list of all offences, if there are any.
fn check(offences: &[String]) {
    let mut text = String::new();
    for offence in offences {
        let _ = writeln!(text, "  {offence}");
    }
    assert!(offences.is_empty(), "\n{text}");
}

#[test]
fn modules_use_only_modules_above_them() {
    let modules = modules();
    let place = |name: &str| modules.iter().position(|module| module == name);
    let mut offences = Vec::new();
    for source in sources() {
        if source.module == "lib" {
            continue;
        }
        let path = source.path.display();
        let Some(own) = place(&source.module) else {
            offences.push(format!("{path}: not declared in lib.rs"));
            continue;
        };
        let up = "super::".repeat(source.depth);
        for (number, code) in &source.code {
            let mut used = names_after(code, "crate::");
            used.extend(names_after(code, &up));
            for name in used {
                if name.is_empty() && !code.contains("crate::*") {
                    offences.push(format!("{path}:{number}: write one `use` per module"));
                } else if place(name).is_some_and(|other| other > own) {
                    let module = &source.module;
                    offences.push(format!(
                        "{path}:{number}: {module} is declared above {name} and must not use it"
                    ));
                }
            }
        }
    }
    check(&offences);
}

#[test]
fn files_are_short() {
    let sources = sources();
    let long = sources
        .iter()
        .filter(|source| source.production_lines > PRODUCTION_LINES_MAX);
    let offences = long.map(|source| {
        let (path, lines) = (source.path.display(), source.production_lines);
        format!("{path}: {lines} lines without tests, at most {PRODUCTION_LINES_MAX} are allowed")
    });
    check(&offences.collect::<Vec<_>>());
}

#[test]
fn pure_modules_use_no_clocks_files_threads_or_sockets() {
    let mut offences = Vec::new();
    for source in sources() {
        if !PURE_MODULES.contains(&&*source.module) {
            continue;
        }
        for (number, code) in &source.code {
            for name in IMPURE_NAMES.iter().filter(|name| code.contains(**name)) {
                let (path, module) = (source.path.display(), &source.module);
                offences.push(format!(
                    "{path}:{number}: {module} is pure and must not use {name}"
                ));
            }
        }
    }
    check(&offences);
}

#[test]
fn restricted_crates_are_named_only_where_allowed() {
    let mut offences = Vec::new();
    for source in sources() {
        for (name, places) in SEAMS {
            if source.is_under(places) {
                continue;
            }
            for (number, code) in &source.code {
                if !names_after(code, name).is_empty() {
                    let path = source.path.display();
                    offences.push(format!("{path}:{number}: only {places:?} may name {name}"));
                }
            }
        }
    }
    check(&offences);
}

#[test]
fn no_leftovers_of_unfinished_work_exist() {
    let mut offences = Vec::new();
    for path in files("") {
        let is_text = has_extension(&path, &["rs", "toml", "md", "yaml", "yml", "sh", "py"]);
        let is_script = path.ends_with(".ci/run") || path.ends_with("fuzz/run");
        if !is_text && !is_script {
            continue;
        }
        for (i, line) in read(&path).lines().enumerate() {
            let leftovers = LEFTOVERS.iter().chain(&MACHINE_PATHS);
            for leftover in leftovers.filter(|leftover| line.contains(**leftover)) {
                offences.push(format!("{}:{}: {leftover}", path.display(), i + 1));
            }
        }
    }
    check(&offences);
}

#[test]
fn files_begin_with_a_module_doc() {
    let mut offences = Vec::new();
    for folder in ["src", "benches", "tests", "fuzz/fuzz_targets", "tools"] {
        for path in files(folder) {
            if has_extension(&path, &["rs"]) && !read(&path).starts_with("//! ") {
                offences.push(format!("{}: no `//!` on its first line", path.display()));
            }
        }
    }
    check(&offences);
}

#[test]
fn documents_exist() {
    let missing = DOCUMENTS
        .iter()
        .filter(|name| !root().join(name).is_file())
        .map(|name| format!("{name} is missing"));
    check(&missing.collect::<Vec<_>>());
}

/// Returns whether a file is an input saved by a fuzzer, which names it by its SHA-1. Git ignores
/// these.
fn is_found_input(path: &Path) -> bool {
    let name = path.file_name().unwrap().to_string_lossy();
    name.len() == 40 && name.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// Returns the test names in a line: everything in backquotes that contains `::`.
fn named_tests(line: &str) -> impl Iterator<Item = &str> {
    let quoted = line.split('`').skip(1).step_by(2);
    quoted.filter(|name| name.contains("::"))
}

/// Returns whether the test exists: `module::test` in the suite, or `lib: path::test` in the
/// library.
fn has_test(name: &str, sources: &[PathBuf]) -> bool {
    let (path, test) = match name.strip_prefix("lib: ") {
        Some(rest) => {
            let (module, test) = rest.rsplit_once("::").unwrap();
            (format!("src/{}", module.replace("::", "/")), test)
        }
        None => {
            let (module, test) = name.split_once("::").unwrap();
            (format!("tests/suite/{module}"), test)
        }
    };
    let begin = format!("fn {test}() {{");
    let is_test = |path: &PathBuf| {
        let text = read(path);
        let lines: Vec<&str> = text.lines().map(str::trim).collect();
        let mut pairs = lines.windows(2);
        pairs.any(|pair| pair[0] == "#[test]" && pair[1] == begin)
    };
    let file = Path::new(&path).with_extension("rs");
    sources
        .iter()
        .filter(|source| **source == file || source.starts_with(&path))
        .any(is_test)
}

#[test]
fn rows_of_the_conformance_table_name_existing_tests() {
    const DOCUMENT: &str = "docs/pd-sidecar.md";
    let text = read(Path::new(DOCUMENT));
    let (_, section) = text.split_once("\n## Conformance\n").unwrap();
    let begin = text.lines().count() - section.lines().count();
    let sources = [files("src"), files("tests/suite")].concat();
    let mut offences = Vec::new();
    let (mut rows, mut is_row) = (0, false);
    for (nth, line) in section.lines().enumerate() {
        let at = begin + nth + 1;
        if is_row && line.starts_with('|') {
            rows += 1;
            if named_tests(line).next().is_none() {
                offences.push(format!("{DOCUMENT}:{at}: a row without a test"));
            }
            for name in named_tests(line).filter(|name| !has_test(name, &sources)) {
                offences.push(format!("{DOCUMENT}:{at}: no test `{name}`"));
            }
        }
        is_row = line.starts_with("|---") || (is_row && line.starts_with('|'));
    }
    assert!(rows > 0, "no rows in {DOCUMENT}");
    check(&offences);
}

#[test]
fn fuzz_corpora_are_small_and_complete() {
    let names = |folder: &str| -> BTreeSet<String> {
        let entries = fs::read_dir(root().join(folder)).unwrap();
        let stem = |path: PathBuf| path.file_stem().unwrap().to_string_lossy().into_owned();
        entries.map(|entry| stem(entry.unwrap().path())).collect()
    };
    let targets = names("fuzz/fuzz_targets");
    assert_eq!(targets, names("fuzz/corpus"));
    let manifest = read(Path::new("fuzz/Cargo.toml"));
    let mut offences = Vec::new();
    for target in targets {
        if !manifest.contains(&format!("\nname = \"{target}\"\n")) {
            offences.push(format!("fuzz/Cargo.toml: {target} is missing"));
        }
        let mut inputs = files(&format!("fuzz/corpus/{target}"));
        inputs.retain(|path| !is_found_input(path));
        if inputs.len() > CORPUS_FILES_MAX {
            offences.push(format!("{target}: {} inputs", inputs.len()));
        }
        for path in inputs {
            let len = fs::metadata(root().join(&path)).unwrap().len();
            if len > CORPUS_FILE_BYTES_MAX {
                offences.push(format!("{}: {len} bytes", path.display()));
            }
        }
    }
    check(&offences);
}

#[test]
fn tests_are_distinguished_from_production_code() {
    let text = "use a;\n#[cfg(test)]\nmod helpers;\nfn f() {}\n#[cfg(test)]\n#[path = \"x\"]\nmod x;\n\
                #[cfg(test)]\nconst C: &[u8] = &[\n    1,\n];\nfn g() {}\n    #[cfg(test)]\n    \
                fn h(\n        a: u8,\n    ) -> u8 {\n        a\n    }\nfn i() {}\n#[cfg(test)]\n\
                mod tests {\n    fn j() {}\n}\n";
    let kept = without_tests(text);
    let lines: Vec<&str> = kept.lines.iter().map(|(_, line)| *line).collect();
    assert_eq!(lines, ["use a;", "fn f() {}", "fn g() {}", "fn i() {}"]);
    assert_eq!(kept.test_modules, ["helpers", "x"]);
    assert_eq!(
        names_after("use crate::h1::Name; $crate::no", "crate::"),
        ["h1"]
    );
    assert_eq!(names_after("super::super::a", "super::super::"), ["a"]);
    assert!(names_after("super::super::a", "super::").contains(&"super"));
}
