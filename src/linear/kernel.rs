//! The kernels of linear maps: what is compiled into one, its WGSL, its bindings and its uniform block.

use super::{LinearKernel, LinearProblem, OPERANDS};
use crate::blueprint::Io;
use crate::caps::{Caps, MatrixUnits};
use crate::dtype::Dtype;
use crate::error::Operand;
use crate::fused::LEAST_SUBGROUP;
use crate::layout::Layout;
use crate::params::ParamLayout;
use crate::shader::{cells, load_part, placed, store_part};
use crate::unroll::unroll;

macro_rules! part {
    ($name:literal) => {
        include_str!(concat!("../../shaders/", $name, ".wgsl"))
    };
}

/// Threads of the tile kernel along the outputs (a quad each) and along the rows, and quads of inputs that
/// are staged at a time: 128 threads, and 10 KiB of workgroup memory, so that several workgroups share a
/// multiprocessor whose threads can have 128 registers or more.
const SIDE_X: u32 = 16;
const SIDE_Y: u32 = 8;
const STEP: u32 = 4;

/// Threads of the direct kernel: a vector of most processors.
const LANES: u32 = 8;

/// Rows from which on its largest tile pays, which takes twice as long to compile.
const MANY_ROWS: u32 = 8 * LANES;

/// Fewest threads of the kernel for few rows: whole subgroups, of any size up to that.
const FEW_THREADS: u32 = 64;

/// Most registers of a thread that fragments may take; a GPU has 255 or 256.
const MOST_REGISTERS: u32 = 176;

/// Inputs of a chain of products, and inputs of which the outer sums take care before the third level does:
/// the error of a sum grows with the square root of its terms, or with their number where all are alike.
const LEVEL: u32 = 64;
const FAR: u32 = 1024;

/// A kernel's own sizes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Sizes {
    /// Rows of a thread.
    Tile { rows: u32 },
    /// Rows and quads of outputs of a workgroup, and threads that share a quad; how many of them a subgroup
    /// covers, if it is asked to.
    Few { rows: u32, quads: u32, lanes: u32, share: Option<u32> },
    /// On cooperative matrices.
    Matrix(Matrix),
    /// Rows and quads of outputs of a thread; which of the two differ from thread to thread.
    Direct { rows: u32, quads: u32, over_rows: bool },
}

/// Sizes of the kernel on cooperative matrices: subgroups of a workgroup along the rows and along the
/// outputs, and fragments of each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Matrix {
    edge: u32,
    subgroup: u32,
    down: u32,
    across: u32,
    bands: u32,
    columns: u32,
    /// Inputs that are staged at a time.
    step: u32,
    /// Workgroup memory is of scalars.
    scalars: bool,
}

impl Matrix {
    /// Of a device that has none.
    const NONE: Self =
        Self { edge: 0, subgroup: 0, down: 0, across: 0, bands: 0, columns: 0, step: 0, scalars: false };

    /// The most rows that there are, and that registers and workgroup memory take.
    fn of(rows: u32, far: bool, by_outputs: bool, caps: &Caps) -> Self {
        let units = caps.matrix.as_ref().filter(|_| LinearKernel::Matrix.lacks(caps).is_none());
        let Some(&MatrixUnits { edge, subgroup, scalars, .. }) = units else {
            return Self::NONE;
        };
        let sized = |bands| Self { edge, subgroup, down: 2, across: 2, bands, columns: 2, step: 32, scalars };
        let suits = |matrix: &Self| {
            matrix.registers(far) <= MOST_REGISTERS
                && matrix.workgroup_bytes(by_outputs) <= caps.max_workgroup_bytes
        };
        let wanted = rows.div_ceil(2 * edge).next_power_of_two();
        [4, 2].map(sized).into_iter().find(|m| m.bands <= wanted && suits(m)).unwrap_or(sized(1))
    }

    fn subgroups(self) -> u32 {
        self.down * self.across
    }

    fn rows(self) -> u32 {
        self.down * self.bands * self.edge
    }

    fn outputs(self) -> u32 {
        self.across * self.columns * self.edge
    }

    /// Sums of two levels or three, and what is multiplied.
    fn registers(self, far: bool) -> u32 {
        let of_a_fragment = (self.edge * self.edge).div_ceil(self.subgroup.max(1));
        let sums = self.bands * self.columns * (2 + u32::from(far));
        of_a_fragment * (sums + (self.bands + 1).div_ceil(2))
    }

    /// Tiles of x and W as f16 and a fragment of y for each subgroup as f32, rows skewed by 16 bytes.
    fn workgroup_bytes(self, by_outputs: bool) -> u32 {
        let (edge, step) = (self.edge, self.step);
        let w = if by_outputs { step * (self.outputs() + 8) } else { self.outputs() * (step + 8) };
        2 * (self.rows() * (step + 8) + w) + 4 * self.subgroups() * edge * (edge + 4)
    }
}

/// Everything that is compiled into one pipeline of a linear map.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Linear {
    sizes: Sizes,
    x: Io,
    w: Io,
    /// W's vectors lie along the outputs, else along the inputs.
    by_outputs: bool,
    bias: Option<Io>,
    y: Io,
    /// The inputs are whole quads.
    whole: bool,
    /// There are so many inputs that sums need a third level.
    far: bool,
}

impl Linear {
    /// What serves a problem, which has been validated.
    pub(crate) fn new(problem: &LinearProblem, caps: &Caps) -> Self {
        Self::of(problem, problem.kernel.unwrap_or_else(|| problem.kernel_on(caps)), caps)
    }

    /// A problem by a kernel, whether it fits the device or not.
    pub(crate) fn of(problem: &LinearProblem, kernel: LinearKernel, caps: &Caps) -> Self {
        let p = problem;
        let io = |dtype, vec4| Io { dtype, vec4, native: dtype == Dtype::F16 && caps.shader_f16 };
        // The other way round than it is described.
        let [.., to_output, to_input] = p.w.strides;
        let transposed = Layout { offset: p.w.offset, strides: [0, 0, to_input, to_output] };
        let by_outputs = to_output == 1 && to_input != 1 && p.outputs > 1;
        let matrix =
            |layout: Layout| Layout { strides: [0, 0, layout.strides[2], layout.strides[3]], ..layout };
        let w_vec4 = if by_outputs { transposed.is_vec4(p.outputs) } else { matrix(p.w).is_vec4(p.inputs) };
        let x = io(p.dtype, matrix(p.x).is_vec4(p.inputs));
        let w = io(p.weight_dtype, w_vec4);
        let rows = p.rows.clamp(1, 1 << 16) as u32;
        let far = p.inputs > FAR as usize;
        let few = |subgroup: bool| {
            // The wider the vectors of neighbours the better the reads of W.
            let (quads, lanes) = if by_outputs { (8, 16) } else { (2, FEW_THREADS / 2) };
            let share = subgroup.then(|| {
                let least = caps.subgroup.map_or(LEAST_SUBGROUP, |(least, _)| least);
                let apart = if by_outputs { quads } else { 1 };
                (least / apart).clamp(1, lanes)
            });
            Sizes::Few { rows: rows.next_power_of_two().min(super::FEW_ROWS as u32), quads, lanes, share }
        };
        let sizes = match kernel {
            // No more rows than there are.
            LinearKernel::Tile => Sizes::Tile { rows: rows.div_ceil(SIDE_Y).next_power_of_two().min(8) },
            LinearKernel::Matrix => Sizes::Matrix(Matrix::of(rows, far, by_outputs, caps)),
            LinearKernel::Few => few(false),
            LinearKernel::FewSubgroup => few(true),
            LinearKernel::Direct => direct(rows, x, w, by_outputs),
        };
        Self {
            sizes,
            x,
            w,
            by_outputs,
            // Read once for each element of y: any way will do.
            bias: p.bias.map(|bias| io(bias.dtype, false)),
            y: io(p.out_dtype, matrix(p.y).is_vec4(p.outputs)),
            whole: p.inputs.is_multiple_of(4),
            far,
        }
    }

    /// What multiplies rows that attention reads, as `x` says, by f32 matrices of a head:
    /// `[inputs, outputs]`, or `[outputs, inputs]`.
    pub(crate) fn product(x: Io, [rows, inputs, outputs]: [usize; 3], by_outputs: bool, caps: &Caps) -> Self {
        let p = LinearProblem { dtype: x.dtype, ..LinearProblem::new(rows.max(1), inputs, outputs) };
        let all = Self::new(&if by_outputs { p.with_transposed_weights() } else { p }, caps);
        let sizes = match all.sizes {
            Sizes::Direct { .. } => direct(p.rows.min(1 << 16) as u32, x, all.w, all.by_outputs),
            sizes => sizes,
        };
        Self { sizes, x, ..all }
    }

    pub(crate) fn kernel(&self) -> LinearKernel {
        match self.sizes {
            Sizes::Tile { .. } => LinearKernel::Tile,
            Sizes::Matrix(_) => LinearKernel::Matrix,
            Sizes::Few { share: None, .. } => LinearKernel::Few,
            Sizes::Few { share: Some(_), .. } => LinearKernel::FewSubgroup,
            Sizes::Direct { .. } => LinearKernel::Direct,
        }
    }

    pub(crate) fn name(&self) -> &'static str {
        self.kernel().name()
    }

    /// Rows and quads of outputs of a workgroup.
    fn tile(&self) -> [u32; 2] {
        match self.sizes {
            Sizes::Tile { rows } => [SIDE_Y * rows, SIDE_X],
            Sizes::Few { rows, quads, .. } => [rows, quads],
            Sizes::Matrix(matrix) => [matrix.rows().max(1), (matrix.outputs() / 4).max(1)],
            Sizes::Direct { rows, quads, over_rows: true } => [LANES * rows, quads],
            Sizes::Direct { rows, quads, over_rows: false } => [rows, LANES * quads],
        }
    }

    /// Workgroups that own a tile. Fits a u32: y's elements are no more than that, all of them in different
    /// places, and each tile has one.
    pub(crate) fn groups(&self, problem: &LinearProblem) -> u64 {
        self.tiles(problem.rows as u64, problem.outputs as u64)
    }

    /// The same for any matrix of outputs.
    pub(crate) fn tiles(&self, rows: u64, outputs: u64) -> u64 {
        let [tile_rows, quads] = self.tile().map(u64::from);
        rows.div_ceil(tile_rows) * outputs.div_ceil(4 * quads)
    }

    /// Threads of a workgroup.
    pub(crate) fn threads(&self) -> u32 {
        match self.sizes {
            Sizes::Tile { .. } => SIDE_X * SIDE_Y,
            Sizes::Few { quads, lanes, .. } => quads * lanes,
            Sizes::Matrix(matrix) => matrix.subgroup * matrix.subgroups(),
            Sizes::Direct { .. } => LANES,
        }
    }

    /// Bytes of workgroup memory.
    pub(crate) fn workgroup_bytes(&self) -> u32 {
        match self.sizes {
            Sizes::Tile { rows } => {
                let w = if self.by_outputs { 4 * SIDE_X * STEP } else { 4 * SIDE_X * (STEP + 1) };
                16 * (SIDE_Y * rows * (STEP + 1) + w)
            }
            Sizes::Few { rows, quads, lanes, share } => 16 * rows * quads * lanes / share.unwrap_or(1),
            Sizes::Matrix(matrix) => matrix.workgroup_bytes(self.by_outputs),
            Sizes::Direct { .. } => 0,
        }
    }

    /// Why the device cannot run this; `None` where it can.
    pub(crate) fn unfit(&self, caps: &Caps) -> Option<String> {
        if let Some(why) = self.kernel().lacks(caps) {
            return Some(why);
        }
        let [x, w] = [self.x.dtype, self.w.dtype];
        if matches!(self.sizes, Sizes::Matrix(_)) && [x, w] != [Dtype::F16; 2] {
            return Some(format!("matrix units take f16, not {}", if x == Dtype::F16 { w } else { x }));
        }
        let threads = self.threads();
        let storage = self.storage().len() as u32;
        for (what, need, got) in [
            ("threads a workgroup", threads, caps.max_invocations),
            ("threads along x", threads, caps.max_workgroup_size[0]),
            ("bytes of workgroup memory", self.workgroup_bytes(), caps.max_workgroup_bytes),
            ("storage buffers", storage, caps.max_storage_buffers),
        ] {
            if need > got {
                return Some(format!("it needs {need} {what}, the device has {got}"));
            }
        }
        None
    }

    /// Its operands with their bindings' numbers, in order of those, and whether it writes them.
    pub(crate) fn storage(&self) -> Vec<(u32, Operand, bool)> {
        let all = OPERANDS.into_iter().filter(|&operand| operand != Operand::Bias || self.bias.is_some());
        all.map(|operand| (number(operand), operand, operand == Operand::Y)).collect()
    }

    pub(crate) fn wgsl(&self) -> String {
        let mut out = String::new();
        let ios = [Some(self.x), Some(self.w), self.bias, Some(self.y)];
        if ios.iter().flatten().any(|io| io.native) {
            out.push_str("enable f16;\n");
        }
        if matches!(self.sizes, Sizes::Matrix(_)) {
            out.push_str("enable wgpu_cooperative_matrix;\n");
        }
        out.push_str(&format!("// {}, composed from shaders/\n", self.name()));
        out.push_str(&self.header());
        let mut add = |text: &str| {
            out.push('\n');
            out.push_str(text);
        };
        add(part!("linear_params"));
        add(part!("common"));
        if ios.iter().flatten().any(|io| io.dtype != Dtype::F32 && !io.native) {
            add(part!("io/convert"));
        }
        let named = |text: &str, operand: Operand, io: Io, width: &str| {
            text.replace("OPERAND", &operand.to_string())
                .replace("BINDING", &number(operand).to_string())
                .replace("DTYPE", &io.dtype.to_string())
                .replace("WIDTH", width)
        };
        let by_element = part!("io/load4_by_element");
        add(&named(load_part(self.x), Operand::X, self.x, "inputs"));
        if !self.x.vec4 {
            add(&named(by_element, Operand::X, self.x, "inputs"));
        }
        add(part!("io/linear_x"));
        let along = if self.by_outputs { "outputs" } else { "inputs" };
        add(&named(&self.load_w(), Operand::W, self.w, along));
        match self.bias {
            Some(io) => {
                add(&named(load_part(io), Operand::Bias, io, "outputs"));
                add(part!("io/linear_bias"));
            }
            None => add(part!("io/linear_bias_none")),
        }
        add(&named(&store_part(self.y), Operand::Y, self.y, "outputs"));
        add(part!("io/linear_end"));
        add(part!("io/linear_band"));
        add(&self.kernel_text());
        out
    }

    /// The WGSL of a product but its rows and where it goes (shaders/io/product*.wgsl), of parameters that
    /// are the widths of x and of the output.
    pub(crate) fn product_wgsl(&self, w: u32, [inputs, outputs]: [&str; 2]) -> String {
        let [inputs, outputs] = [inputs, outputs].map(|name| format!("params.{name}"));
        let (along, to_input, to_output) =
            if self.by_outputs { (&outputs, &*outputs, "1u") } else { (&inputs, "1u", &*inputs) };
        let load = self.load_w().replace("OPERAND", "w").replace("BINDING", &w.to_string());
        let text = [load.replace("params.WIDTH", along), self.kernel_text()].join("\n");
        let text = text
            .replace("params.rows", "product_rows()")
            .replace("params.groups", "product_tiles()")
            .replace("params.w_offset", "product_w()")
            .replace("params.w_stride_d", to_input)
            .replace("params.w_stride_s", to_output)
            .replace("params.inputs", &inputs)
            .replace("params.outputs", &outputs);
        [self.header(), text].join("\n")
    }

    /// The compile-time sizes.
    fn header(&self) -> String {
        let mut out = String::new();
        for (name, value) in self.constants() {
            out.push_str(&format!("const {name}: u32 = {value}u;\n"));
        }
        out.push_str(&format!("const BY_OUTPUTS: bool = {};\n", self.by_outputs));
        out.push_str(&format!("const WHOLE: bool = {};\n", self.whole));
        out
    }

    /// How W is read, as it lies.
    fn load_w(&self) -> String {
        let mut out = load_part(self.w).to_string();
        let by_element = part!("io/load4_by_element");
        if !self.w.vec4 && self.by_outputs {
            out.push_str(&by_element.replace("stride_d", "stride_s"));
        } else if !self.w.vec4 {
            out.push_str(by_element);
        }
        out.push_str(if self.by_outputs {
            part!("io/linear_w_by_outputs")
        } else {
            part!("io/linear_w_by_inputs")
        });
        out
    }

    /// The kernel, between what it reads and what it writes.
    fn kernel_text(&self) -> String {
        let mut out = String::new();
        let mut add = |text: &str| {
            out.push('\n');
            out.push_str(text);
        };
        let text = match self.sizes {
            Sizes::Tile { .. } => {
                let by_outputs = self.by_outputs;
                add(part!("exchange/pairs"));
                add(if by_outputs {
                    part!("io/linear_stage_by_outputs")
                } else {
                    part!("io/linear_stage_by_inputs")
                });
                part!("kernel/linear_tile")
            }
            Sizes::Few { share, .. } => {
                let (place, exchange) = match share {
                    None => (part!("exchange/place_workgroup"), part!("io/linear_share_none")),
                    Some(_) => (part!("exchange/place_subgroup"), part!("io/linear_share_subgroup")),
                };
                add(place);
                add(exchange);
                add(&unroll(&placed(part!("kernel/linear_few"), share.is_some()), &self.constants()));
                return out;
            }
            Sizes::Matrix(matrix) => {
                add(part!("exchange/place_subgroup"));
                let (stage, load) = if self.by_outputs {
                    (part!("io/linear_matrix_by_outputs"), "coopLoadT")
                } else {
                    (part!("io/linear_matrix_by_inputs"), "coopLoad")
                };
                add(stage);
                for name in ["x", "w"] {
                    add(&cells(matrix.scalars, name, "f16"));
                }
                let fragment = format!("coop_mat{0}x{0}", matrix.edge);
                let text = placed(part!("kernel/linear_matrix"), true).replace("FRAGMENT", &fragment);
                add(&unroll(&text.replace("LOAD_W", load), &self.constants()));
                return out;
            }
            Sizes::Direct { .. } => part!("kernel/linear_direct"),
        };
        add(&unroll(text, &self.constants()));
        out
    }

    fn constants(&self) -> Vec<(&'static str, u32)> {
        // A level is some steps of a thread.
        let levels = |step: u32| {
            [("LEVEL", (LEVEL / step).max(1)), ("FAR_LEVELS", FAR / LEVEL), ("FAR", self.far.into())]
        };
        let [tile_rows, tile_quads] = self.tile();
        let tile = [("TILE_ROWS", tile_rows), ("TILE_QUADS", tile_quads)];
        match self.sizes {
            Sizes::Tile { rows } => {
                let own = [("SIDE_X", SIDE_X), ("SIDE_Y", SIDE_Y), ("STEP", STEP), ("ROWS", rows)];
                [&own[..], &tile, &levels(4 * STEP)].concat()
            }
            Sizes::Few { rows, quads, lanes, share } => {
                let own = [
                    ("ROWS", rows),
                    ("QUADS", quads),
                    ("LANES", lanes),
                    ("THREADS", quads * lanes),
                    ("SHARE", share.unwrap_or(1)),
                    ("NEXT", if self.by_outputs { quads } else { 1 }),
                ];
                [&own[..], &tile, &levels(4)].concat()
            }
            Sizes::Matrix(m) => {
                let own = [
                    ("EDGE", m.edge),
                    ("THREADS", m.subgroup * m.subgroups()),
                    ("DOWN", m.down),
                    ("ACROSS", m.across),
                    ("BANDS", m.bands),
                    ("COLUMNS", m.columns),
                    ("STEP", m.step),
                    ("CELL", if m.scalars { 4 } else { 1 }),
                ];
                [&own[..], &tile, &levels(1)].concat()
            }
            Sizes::Direct { rows, quads, over_rows } => {
                let own = [
                    ("LANES", LANES),
                    ("ROWS", rows),
                    ("QUADS", quads),
                    ("LANE_ROWS", if over_rows { rows } else { 0 }),
                    ("LANE_QUADS", if over_rows { 0 } else { quads }),
                ];
                [&own[..], &tile, &levels(1)].concat()
            }
        }
    }
}

/// The direct kernel's sizes. Each row or quad that differs from thread to thread is gathered, lane by lane,
/// which costs as much as some 100 products; the more of the other kind use it the better, until the text
/// leaves a processor's instruction cache (some 1000 products) or its compiler's patience. Found by trial on
/// lavapipe 26.1.
fn direct(rows: u32, x: Io, w: Io, by_outputs: bool) -> Sizes {
    let over_rows = |rows, quads| Sizes::Direct { rows, quads, over_rows: true };
    let over_quads = |rows, quads| Sizes::Direct { rows, quads, over_rows: false };
    let vec4 = x.vec4 && w.vec4;
    match rows {
        // Elements that are loaded one by one are text as well, and so is what unpacks them.
        1..=16 if !vec4 => over_quads(rows.next_power_of_two().min(8), 1),
        1..=16 => over_quads(rows.next_power_of_two(), 2),
        _ if !vec4 => over_rows(4, 4),
        // Where W has to be transposed in registers, more rows share that.
        MANY_ROWS.. if [x.dtype, w.dtype] == [Dtype::F32; 2] && !by_outputs => over_rows(8, 8),
        _ => over_rows(4, 8),
    }
}

/// What a device lacks for the kernel that shares sums in subgroups.
pub(crate) fn lacks_subgroups(caps: &Caps) -> Option<String> {
    caps.subgroups_unfit(LEAST_SUBGROUP, FEW_THREADS)
}

/// A binding's number, always the same.
fn number(operand: Operand) -> u32 {
    match operand {
        Operand::X => 1,
        Operand::W => 2,
        Operand::Bias => 3,
        _ => 4,
    }
}

/// Runtime parameters; see the WGSL twin for what each means.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
pub(crate) struct LinearParams {
    rows: u32,
    inputs: u32,
    outputs: u32,
    groups: u32,
    heads_q: u32,
    head_first: u32,
    row_first: u32,
    x: ParamLayout,
    w: ParamLayout,
    bias: ParamLayout,
    y: ParamLayout,
}

impl LinearParams {
    /// `first` gives the element that the binding of an operand begins with.
    pub(crate) fn new(problem: &LinearProblem, groups: u32, first: impl Fn(Operand) -> usize) -> Self {
        let layout = |operand| {
            let of = problem.layout(operand);
            of.map_or(ParamLayout::default(), |(layout, _)| {
                ParamLayout::new(layout, problem.shape(operand), first(operand))
            })
        };
        Self {
            rows: problem.rows as u32,
            inputs: problem.inputs as u32,
            outputs: problem.outputs as u32,
            groups,
            x: layout(Operand::X),
            w: layout(Operand::W),
            bias: layout(Operand::Bias),
            y: layout(Operand::Y),
            ..Self::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pipeline::{Recipe, reflection};

    /// Every kernel that there is: families x types x alignments x orders of W x bias, with and without the
    /// shader's own f16.
    fn every_kernel() -> Vec<(Linear, Caps)> {
        let mut all = Vec::new();
        for shader_f16 in [false, true] {
            let caps = Caps {
                shader_f16,
                subgroup: Some((32, 32)),
                matrix: Some(MatrixUnits { edge: 16, subgroup: 32, scalars: false, tested: None }),
                ..Caps::minimal()
            };
            for &kernel in LinearKernel::ALL {
                for (dtype, weight_dtype, out_dtype) in [
                    (Dtype::F32, Dtype::F32, Dtype::F32),
                    (Dtype::F16, Dtype::F16, Dtype::F16),
                    (Dtype::Bf16, Dtype::Bf16, Dtype::Bf16),
                    (Dtype::F32, Dtype::F16, Dtype::Bf16),
                    (Dtype::Bf16, Dtype::F32, Dtype::F16),
                    (Dtype::F16, Dtype::Bf16, Dtype::F32),
                    (Dtype::F16, Dtype::F16, Dtype::F32),
                ] {
                    if kernel == LinearKernel::Matrix
                        && (!shader_f16 || [dtype, weight_dtype] != [Dtype::F16; 2])
                    {
                        continue;
                    }
                    for (rows, inputs, outputs) in [(1, 8, 8), (6, 8, 7), (40, 7, 8), (100, 64, 36)] {
                        let p = LinearProblem::new(rows, inputs, outputs);
                        let p = LinearProblem { dtype, weight_dtype, out_dtype, kernel: Some(kernel), ..p };
                        for p in [p, p.with_transposed_weights().with_bias(weight_dtype)] {
                            p.validate().unwrap();
                            let linear = Linear::new(&p, &caps);
                            assert_eq!((linear.kernel(), linear.unfit(&caps)), (kernel, None));
                            assert_eq!(linear.name(), kernel.to_string());
                            all.push((linear, caps.clone()));
                        }
                    }
                }
            }
        }
        all
    }

    #[test]
    fn every_kernel_is_valid_wgsl_with_the_bindings_that_it_says() {
        for (kernel, caps) in every_kernel() {
            let bytes = reflection::check(Recipe::Linear(kernel), caps.shader_f16);
            // What it says of its workgroup memory is what it has.
            let exact = Caps { max_workgroup_bytes: bytes, ..caps };
            assert_eq!(kernel.unfit(&exact), None);
            let less = Caps { max_workgroup_bytes: bytes.saturating_sub(1), ..exact };
            assert_eq!(kernel.unfit(&less).is_some(), bytes > 0, "{kernel:?}");
        }
    }

    #[test]
    fn w_is_read_as_it_lies() {
        let of = |p: LinearProblem| {
            let linear = Linear::new(&p, &Caps::minimal());
            (linear.by_outputs, linear.w.vec4)
        };
        let p = LinearProblem::new(4, 8, 12);
        assert_eq!(of(p), (false, true));
        assert_eq!(of(p.with_transposed_weights()), (true, true));
        assert_eq!(of(LinearProblem { w: p.w.at(2), ..p }), (false, false));
        assert_eq!(of(LinearProblem { outputs: 11, ..p }), (false, true));
        assert_eq!(of(LinearProblem { outputs: 11, ..p }.with_transposed_weights()), (true, false));
        assert_eq!(of(LinearProblem { inputs: 7, ..p }.with_transposed_weights()), (true, true));
        assert_eq!(
            of(LinearProblem { w: Layout { offset: 0, strides: [0, 0, 32, 2] }, ..p }),
            (false, false)
        );
    }

    #[test]
    fn wgsl_twin_has_the_same_members_in_the_same_places() {
        let module = naga::front::wgsl::parse_str(part!("linear_params")).unwrap();
        let (_, ty) = module.types.iter().find(|(_, ty)| ty.name.as_deref() == Some("Params")).unwrap();
        let naga::TypeInner::Struct { members, span } = &ty.inner else { panic!("not a struct") };
        assert_eq!(*span as usize, size_of::<LinearParams>());
        // Each word of a block says its own number: what a WGSL member reads is where it lies.
        let words: Vec<u32> = (0..size_of::<LinearParams>() as u32 / 4).collect();
        let p: LinearParams = *bytemuck::from_bytes(bytemuck::cast_slice(&words));
        let mut twin: Vec<(String, u32)> = [
            ("rows", p.rows),
            ("inputs", p.inputs),
            ("outputs", p.outputs),
            ("groups", p.groups),
            ("heads_q", p.heads_q),
            ("head_first", p.head_first),
            ("row_first", p.row_first),
        ]
        .map(|(name, at)| (name.to_string(), at))
        .to_vec();
        for (name, l) in [("x", p.x), ("w", p.w), ("bias", p.bias), ("y", p.y)] {
            let fields = [("offset", l.offset), ("stride_b", l.stride_b), ("stride_h", l.stride_h)];
            let last = [("stride_s", l.stride_s), ("stride_d", l.stride_d)];
            twin.extend(fields.into_iter().chain(last).map(|(field, at)| (format!("{name}_{field}"), at)));
        }
        let wgsl: Vec<_> = members.iter().map(|m| (m.name.clone().unwrap(), m.offset / 4)).collect();
        assert_eq!(twin, wgsl);
    }
}
