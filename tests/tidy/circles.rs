//! Which file of the library imports which: no circles, and only downwards in the layers.

use std::collections::{BTreeMap, BTreeSet};

use super::{Source, check, sources};

/// A module as the names on its path: `["h1", "head"]`.
type Module = Vec<String>;

/// Mechanisms that are one thing in several files. Their files may import each other.
const ONE_THING: [&str; 3] = ["json/block", "net/reactor", "net/sim"];

/// The files of a module in layers. A file may import files of the same layer and of those above.
/// A folder counts as one file.
const LAYERS: [(&str, &[&[&str]]); 3] = [
    (
        "upstream",
        &[
            &[
                "wait",
                "error",
                "attempts",
                "head",
                "buffers",
                "pool",
                "engine",
                "scope",
                "addresses",
            ],
            &["upstreams"],
            &["dial", "connection", "response", "request"],
            &["trouble"],
            &["call", "task"],
        ],
    ),
    (
        "proxy",
        &[
            &[
                "request_id",
                "head",
                "request",
                "ahead",
                "places",
                "target_cache",
                "push_book",
                "idle",
            ],
            &["shard"],
            &["client"],
            &["access_log"],
            &["exchange"],
            &["choose", "allowlist", "routing"],
            &["trace"],
            &["leg", "inspect"],
            &["upload"],
            &["tunnel", "relay", "body", "forward"],
            &["flow"],
            &["serve"],
            &["session"],
            &["sim_tests"],
        ],
    ),
    (
        "control",
        &[
            &[
                "inbox",
                "publish",
                "watch",
                "sockets",
                "resolver_threads",
                "handshakes",
                "certificate",
                "tls",
                "otlp",
                "traces",
                "incidents",
                "memory",
                "page_listener",
            ],
            &["engine_page"],
            &[
                "discovery",
                "health",
                "heartbeat",
                "signals",
                "versions",
                "accept",
                "reload",
                "shards",
                "metrics_port",
            ],
            &["supervise"],
            &["startup"],
            &["preflight"],
            &["demo"],
        ],
    ),
];

/// The imports of the library: the modules that each module uses.
struct Imports(BTreeMap<Module, BTreeSet<Module>>);

impl Imports {
    fn read() -> Self {
        let texts: BTreeMap<Module, String> = sources()
            .iter()
            .map(|source| (module_of(source), text_of(source)))
            .collect();
        let mut uses: BTreeMap<&Module, Vec<Module>> = BTreeMap::new();
        // Names that a module exports from another one, and the path of each.
        let mut exported: BTreeMap<(Module, String), Module> = BTreeMap::new();
        for (module, text) in &texts {
            let (statements, rest) = split_uses(text);
            let paths = uses.entry(module).or_default();
            for (is_export, tree) in statements {
                for path in expand(&tree, &[]) {
                    let Some(path) = absolute(&path, module, &texts) else {
                        continue;
                    };
                    match path.last() {
                        Some(name) if is_export => {
                            exported.insert((module.clone(), name.clone()), path);
                        }
                        _ => paths.push(path),
                    }
                }
            }
            paths.extend(inline_paths(&rest, module, &texts));
        }
        let mut imports = BTreeMap::new();
        for (module, paths) in uses {
            let mut used = BTreeSet::new();
            for path in paths {
                let target = resolve(path, &texts, &exported);
                if !target.is_empty() && target != *module {
                    used.insert(target);
                }
            }
            imports.insert(module.clone(), used);
        }
        Self(imports)
    }

    /// Returns a circle of imports that leads from `start` back to it, if there is one.
    fn circle<'a>(&'a self, start: &'a Module) -> Option<Vec<&'a Module>> {
        let mut reached: BTreeMap<&'a Module, &'a Module> = BTreeMap::new();
        let mut open = vec![start];
        while let Some(module) = open.pop() {
            for used in self.0.get(module).into_iter().flatten() {
                if used == start {
                    let mut path = vec![module];
                    while let Some(before) = reached.get(path[path.len() - 1]) {
                        path.push(before);
                    }
                    path.reverse();
                    return Some(path);
                }
                if !reached.contains_key(used) {
                    reached.insert(used, module);
                    open.push(used);
                }
            }
        }
        None
    }
}

fn module_of(source: &Source) -> Module {
    let inside = source.path.strip_prefix("src").unwrap().with_extension("");
    let mut names: Module = inside
        .iter()
        .map(|part| part.to_string_lossy().into_owned())
        .collect();
    if names
        .last()
        .is_some_and(|last| last == "mod" || last == "lib")
    {
        names.pop();
    }
    names
}

fn text_of(source: &Source) -> String {
    let lines = source.code.iter().map(|(_, line)| format!("{line}\n"));
    lines.collect()
}

/// Splits a text into its `use` statements, each with whether it exports, and the rest.
fn split_uses(text: &str) -> (Vec<(bool, String)>, String) {
    let (mut statements, mut rest) = (Vec::new(), String::new());
    let mut open: Option<(bool, String)> = None;
    for line in text.lines() {
        let (is_export, tree) = match &mut open {
            Some((is_export, tree)) => {
                tree.push_str(line.trim());
                (*is_export, tree.clone())
            }
            None => {
                let line = line.trim();
                let after = match line.split_once("use ") {
                    Some((before, after)) if before.is_empty() || before.starts_with("pub") => {
                        Some((!before.is_empty(), after.to_owned()))
                    }
                    _ => None,
                };
                let Some(statement) = after else {
                    rest.push_str(line);
                    rest.push('\n');
                    continue;
                };
                statement
            }
        };
        match tree.strip_suffix(';') {
            Some(whole) => {
                statements.push((is_export, whole.to_owned()));
                open = None;
            }
            None => open = Some((is_export, tree)),
        }
    }
    (statements, rest)
}

/// Returns the paths in a tree of imports: `a::{b, c::d}` has `a::b` and `a::c::d`.
fn expand(tree: &str, prefix: &[String]) -> Vec<Module> {
    let tree = tree.trim();
    let (path, group) = match tree.split_once('{') {
        Some((path, group)) => (path, group.strip_suffix('}')),
        None => (tree.split(" as ").next().unwrap_or(tree), None),
    };
    let names = path.split("::").map(str::trim);
    let names = names.filter(|name| !name.is_empty() && *name != "self");
    let mut start = prefix.to_vec();
    start.extend(names.map(str::to_owned));
    let Some(group) = group else {
        return vec![start];
    };
    let (mut paths, mut depth, mut from) = (Vec::new(), 0, 0);
    for (at, byte) in group.bytes().enumerate() {
        match byte {
            b'{' => depth += 1,
            b'}' => depth -= 1,
            b',' if depth == 0 => {
                paths.extend(expand(&group[from..at], &start));
                from = at + 1;
            }
            _ => {}
        }
    }
    if !group[from..].trim().is_empty() {
        paths.extend(expand(&group[from..], &start));
    }
    paths
}

/// Returns a path from the root of the library; `None` for a path into another crate.
fn absolute(path: &[String], module: &Module, texts: &BTreeMap<Module, String>) -> Option<Module> {
    let first = path.first()?;
    if first == "crate" {
        return Some(path[1..].to_vec());
    }
    let ups = path.iter().take_while(|name| *name == "super").count();
    if ups > 0 {
        let mut whole = module[..module.len().saturating_sub(ups)].to_vec();
        whole.extend_from_slice(&path[ups..]);
        return Some(whole);
    }
    let mut child = module.clone();
    child.push(first.clone());
    let is_child = texts.contains_key(&child);
    child.extend_from_slice(&path[1..]);
    (is_child && !module.is_empty()).then_some(child)
}

/// Returns the paths written in the code itself: `crate::a::b`, `super::b`, and `child::b`.
fn inline_paths(code: &str, module: &Module, texts: &BTreeMap<Module, String>) -> Vec<Module> {
    let is_name = |byte: char| byte.is_ascii_alphanumeric() || byte == '_' || byte == ':';
    let words = code.split(|byte: char| !is_name(byte));
    let paths = words.filter(|word| word.contains("::") && !word.starts_with(':'));
    paths
        .filter_map(|word| {
            let path: Vec<_> = word.split("::").map(str::to_owned).collect();
            absolute(&path, module, texts)
        })
        .collect()
}

/// Returns the module that defines what `path` names, following exports.
fn resolve(
    mut path: Module,
    texts: &BTreeMap<Module, String>,
    exported: &BTreeMap<(Module, String), Module>,
) -> Module {
    // A chain of exports is never longer than this.
    for _ in 0..8 {
        let mut len = path.len();
        while len > 0 && !texts.contains_key(&path[..len]) {
            len -= 1;
        }
        let module = path[..len].to_vec();
        let Some(name) = path.get(len) else {
            return module;
        };
        match exported.get(&(module.clone(), name.clone())) {
            Some(target) => {
                let mut next = target.clone();
                next.extend_from_slice(&path[len + 1..]);
                path = next;
            }
            None => return module,
        }
    }
    path
}

fn is_one_thing(modules: &[&Module]) -> bool {
    ONE_THING.iter().any(|place| {
        let place: Vec<_> = place.split('/').collect();
        modules.iter().all(|module| {
            module
                .iter()
                .map(String::as_str)
                .collect::<Vec<_>>()
                .starts_with(&place)
        })
    })
}

#[test]
fn files_do_not_import_each_other_in_a_circle() {
    let imports = Imports::read();
    let mut offences = BTreeSet::new();
    for module in imports.0.keys() {
        let Some(circle) = imports.circle(module) else {
            continue;
        };
        if !is_one_thing(&circle) {
            let mut names: Vec<_> = circle.iter().map(|module| module.join("/")).collect();
            names.push(module.join("/"));
            offences.insert(names.join(" -> "));
        }
    }
    check(&offences.into_iter().collect::<Vec<_>>());
}

#[test]
fn files_use_only_layers_above_them() {
    let imports = Imports::read();
    let mut offences = Vec::new();
    for (folder, layers) in LAYERS {
        let layer_of = |name: &str| layers.iter().position(|layer| layer.contains(&name));
        for (module, used) in &imports.0 {
            let [first, name, ..] = &module[..] else {
                continue;
            };
            if first != folder {
                continue;
            }
            let Some(own) = layer_of(name) else {
                offences.push(format!("src/{folder}/{name} is in no layer of `LAYERS`"));
                continue;
            };
            for other in used.iter().filter(|other| other[0] == folder) {
                let Some(other) = other.get(1) else { continue };
                if layer_of(other).is_some_and(|layer| layer > own) {
                    let path = module.join("/");
                    offences.push(format!("src/{path} uses src/{folder}/{other} below it"));
                }
            }
        }
    }
    check(&offences);
}

#[test]
fn imports_are_read_from_the_sources() {
    let tree = "crate::a::{self, b::{C, d}, e as f}";
    let names = |path: &Module| path.join("::");
    let paths: Vec<_> = expand(tree, &[]).iter().map(names).collect();
    assert_eq!(
        paths,
        [
            "crate::a",
            "crate::a::b::C",
            "crate::a::b::d",
            "crate::a::e"
        ]
    );
    let (statements, rest) =
        split_uses("use a::{\n    b,\n    c,\n};\npub use d::E;\nlet x = 1;\n");
    assert_eq!(
        statements,
        [(false, "a::{b,c,}".to_owned()), (true, "d::E".to_owned())]
    );
    assert_eq!(rest, "let x = 1;\n");
    // The relay imports the exchange, and the exchange does not import the relay.
    let imports = Imports::read();
    let [relay, exchange] = ["relay", "exchange"].map(|name| {
        let path = ["proxy", name];
        path.map(str::to_owned).to_vec()
    });
    assert!(imports.0[&relay].contains(&exchange));
    assert!(!imports.0[&exchange].contains(&relay));
}
