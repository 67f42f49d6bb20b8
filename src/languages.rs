//! What wgpu makes of a text for adapters that no machine of the tests has: Metal's language and DirectX's. (SPIR-V
//! runs on the software adapters, and browsers take WGSL.) For tests alone.

use naga::back::{hlsl, msl};
use naga::proc::{BoundsCheckPolicies, BoundsCheckPolicy};

/// Writes a valid module in both languages as wgpu does, with its checks and without; none of it may fail.
pub(crate) fn translate(module: &naga::Module, info: &naga::valid::ModuleInfo, context: &str) {
    let is_matrix = |ty: &naga::Type| matches!(ty.inner, naga::TypeInner::CooperativeMatrix { .. });
    let matrices = module.types.iter().any(|(_, ty)| is_matrix(ty));
    for checked in [false, true] {
        let policy = if checked { BoundsCheckPolicy::Restrict } else { BoundsCheckPolicy::Unchecked };
        let options = msl::Options {
            // The first with every option of ours: subgroups, and matrices of any type.
            lang_version: (2, 4),
            bounds_check_policies: BoundsCheckPolicies {
                index: policy,
                buffer: policy,
                image_load: policy,
                binding_array: BoundsCheckPolicy::Unchecked,
            },
            zero_initialize_workgroup_memory: checked,
            force_loop_bounding: checked,
            ..msl::Options::default()
        };
        let (text, entries) = msl::write_string(module, info, &options, &msl::PipelineOptions::default())
            .unwrap_or_else(|error| panic!("{context}: for Metal: {error}"));
        assert!(text.contains("kernel void"), "{context}: no kernel for Metal");
        for entry in entries.entry_point_names {
            entry.unwrap_or_else(|error| panic!("{context}: for Metal: {error}"));
        }
        // DirectX has none in wgpu 30.
        if matrices {
            continue;
        }
        let numbered = numbered_components(module, info);
        assert!(numbered.is_empty(), "{context}: {numbered:?} number a vector's component, see `component`");
        let options = hlsl::Options {
            // The first with 16-bit numbers.
            shader_model: hlsl::ShaderModel::V6_2,
            zero_initialize_workgroup_memory: checked,
            restrict_indexing: checked,
            force_loop_bounding: checked,
            ..hlsl::Options::default()
        };
        let mut text = String::new();
        let written = hlsl::Writer::new(&mut text, &options, &hlsl::PipelineOptions::default())
            .write(module, info, None)
            .unwrap_or_else(|error| panic!("{context}: for DirectX: {error}"));
        for entry in written.entry_point_names {
            entry.unwrap_or_else(|error| panic!("{context}: for DirectX: {error}"));
        }
        let main = text
            .lines()
            .find(|line| line.starts_with("void main("))
            .unwrap_or_else(|| panic!("{context}: no main"));
        let (_, arguments) = main.split_once('(').unwrap();
        for argument in arguments.trim_end_matches(')').split(", ") {
            // naga 30 knows subgroups' built-in values among arguments alone: in a struct it leaves them as they are.
            let told = argument.contains(" : SV_") || argument.starts_with("ComputeInput_main ");
            assert!(told, "{context}: DirectX knows no {argument:?}");
        }
    }
}

/// Functions that take a vector's component by an index that is no constant: DirectX's older compiler (FXC) refuses to store
/// one, and loads one as a dot product with a unit vector, which spreads NaN and loses the sign of a zero.
fn numbered_components(module: &naga::Module, info: &naga::valid::ModuleInfo) -> Vec<String> {
    use naga::TypeInner::{Pointer, ValuePointer, Vector};
    let numbers = |function: &naga::Function, info: &naga::valid::FunctionInfo| {
        function.expressions.iter().any(|(_, expression)| {
            let naga::Expression::Access { base, .. } = *expression else { return false };
            match *info[base].ty.inner_with(&module.types) {
                Vector { .. } | ValuePointer { size: Some(_), .. } => true,
                Pointer { base, .. } => matches!(module.types[base].inner, Vector { .. }),
                _ => false,
            }
        })
    };
    let functions = module.functions.iter().map(|(at, function)| (&function.name, function, &info[at]));
    let found = functions.filter(|(_, function, info)| numbers(function, info));
    let mut found: Vec<String> = found.map(|(name, ..)| name.clone().unwrap_or_default()).collect();
    for (at, entry) in module.entry_points.iter().enumerate() {
        if numbers(&entry.function, info.get_entry_point(at)) {
            found.push(entry.name.clone());
        }
    }
    found
}
