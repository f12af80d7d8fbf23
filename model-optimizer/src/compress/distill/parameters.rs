//! What is trained: weights, biases, norms and tables of a graph, with the masks and the grids that they keep.

use std::collections::{HashMap, HashSet};

use candle_core::{DType, Result, Tensor, Var};
use half::{bf16, f16};
use plimsoll_package::report::Skipped;
use plimsoll_runtime::onnx::tensor_proto::DataType;
use plimsoll_runtime::onnx::{GraphProto, NodeProto, TensorProto, weights};

use super::forward::{Place, live_nodes, of_proto};
use super::quantization::{round, straight};
use super::unreadable;
use crate::compress::prune::prune_magnitude;
use crate::compress::skipped;
use crate::failure::Failure;
use crate::graph::{attribute, is_standard, tensor};

/// The share of zeros above which a weight counts as pruned.
const PRUNED_MIN: f64 = 0.01;

/// A tensor that is trained.
pub(super) struct Parameter {
    /// The initialiser.
    name: String,
    var: Var,
    /// 1 where the value is trained, 0 where it is and stays zero.
    mask: Option<Tensor>,
    form: Form,
    role: Role,
}

/// How a parameter lies in the model.
enum Form {
    /// In floats of this type.
    Float(DataType),
    /// In integers.
    Quantized(Grid),
}

/// What a parameter is to the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    /// The constant operand of a convolution or matrix product: it can be pruned, and it decays.
    Weight,
    /// A table of rows that are looked up.
    Table,
    /// A bias, or the scale or shift of a norm.
    Vector,
}

/// The integers that a weight is rounded to: `round(weight / scale) + zero`, with a scale for the whole weight or for each channel.
struct Grid {
    kind: DataType,
    /// The axes over which a scale is shared.
    shared: Vec<usize>,
    zero: Tensor,
    /// Bounds of `round(weight / scale)`.
    low: Tensor,
    high: Tensor,
    /// The scale before training, with the shared axes of size 1.
    initial: Tensor,
    scale: Scale,
    /// The initialisers that hold the scale, each times a constant.
    holders: Vec<Holder>,
}

/// Where a grid's scale comes from.
enum Scale {
    /// From the weight: its largest and smallest values lie on the integers on which these values lay before training.
    Refreshed { largest: Tensor, smallest: Tensor },
    /// It follows the scale of another parameter.
    Tied { to: usize },
    /// It stays, since something else depends on it.
    Fixed,
}

/// An initialiser that holds a scale.
struct Holder {
    name: String,
    dims: Vec<usize>,
    kind: DataType,
    /// What the scale is multiplied by; 1 but for products with a factor of their own.
    factor: Tensor,
}

/// All that is trained of a graph.
pub(super) struct Parameters {
    list: Vec<Parameter>,
    /// Quantised weights that are not trained, and why.
    pub(super) frozen: Vec<Skipped>,
    place: Place,
}

/// Which nodes make and read the values of a graph.
struct Wiring<'a> {
    initializers: HashMap<&'a str, &'a TensorProto>,
    makers: HashMap<&'a str, &'a NodeProto>,
    readers: HashMap<&'a str, Vec<&'a NodeProto>>,
}

/// A quantised initialiser as a node reads it.
struct Use<'a> {
    integers: &'a str,
    scale: Option<&'a str>,
    zero: Option<&'a str>,
    axis: i64,
    node: &'a NodeProto,
}

impl<'a> Wiring<'a> {
    fn of(graph: &'a GraphProto, live: &[&'a NodeProto]) -> Self {
        let mut wiring = Self {
            initializers: graph.initializer.iter().map(|tensor| (tensor.name(), tensor)).collect(),
            makers: HashMap::new(),
            readers: HashMap::new(),
        };
        for node in live {
            wiring.makers.extend(node.output.iter().map(|output| (output.as_str(), *node)));
            for input in &node.input {
                wiring.readers.entry(input).or_default().push(node);
            }
        }
        wiring
    }

    fn is_float(&self, name: &str) -> bool {
        let kind = self.initializers.get(name).map(|tensor| tensor.data_type());
        let floats = [DataType::Float, DataType::Float16, DataType::Bfloat16, DataType::Double];
        floats.iter().any(|float| kind == Some(*float as i32))
    }

    fn only_reader(&self, value: &str) -> Option<&'a NodeProto> {
        match self.readers.get(value)?[..] {
            [reader] => Some(reader),
            _ => None,
        }
    }

    /// The initialiser that `name` is, or is a mere rearrangement of.
    fn origin(&self, mut name: &'a str) -> Option<&'a str> {
        while !self.initializers.contains_key(name) {
            let maker = self.makers.get(name)?;
            if !matches!(
                maker.op_type(),
                "Identity" | "Cast" | "Transpose" | "Reshape" | "Squeeze" | "Unsqueeze"
            ) {
                return None;
            }
            name = maker.input.first()?;
        }
        Some(name)
    }

    /// The scale of the weight of a product in integers: the constant that the product is multiplied by, alone or together with the
    /// activation's scale.
    fn product_scale(&self, product: &'a NodeProto) -> Option<&'a str> {
        let cast = self.only_reader(product.output.first()?).filter(|node| node.op_type() == "Cast")?;
        let mut value = cast.output.first()?;
        for _ in 0..2 {
            let factor = self.only_reader(value).filter(|node| node.op_type() == "Mul")?;
            let other = factor.input.iter().find(|input| *input != value)?;
            let inner = self.makers.get(other.as_str()).copied().filter(|node| node.op_type() == "Mul");
            let candidates = std::iter::once(other).chain(inner.into_iter().flat_map(|inner| &inner.input));
            if let Some(found) = candidates.map(String::as_str).find(|name| self.is_float(name)) {
                return Some(found);
            }
            value = factor.output.first()?;
        }
        None
    }

    /// How `node` reads a quantised initialiser, where it does.
    fn quantized(&self, node: &'a NodeProto) -> Option<Use<'a>> {
        let input = |index: usize| node.input.get(index).map(String::as_str).filter(|name| !name.is_empty());
        let (integers, scale, zero, axis) = match node.op_type() {
            "DequantizeLinear" => (
                input(0)?,
                input(1),
                input(2),
                attribute(node, "axis").map_or(1, plimsoll_runtime::onnx::AttributeProto::i),
            ),
            "MatMulInteger" => (input(1)?, self.product_scale(node), input(3), -1),
            _ => return None,
        };
        self.initializers.contains_key(integers).then_some(Use {
            integers,
            scale,
            zero,
            axis,
            node,
        })
    }

    /// The quantised weight whose products the integers of a bias are added to.
    fn weight_of_bias(&self, bias: &Use<'a>) -> Option<&'a str> {
        let layer = self.only_reader(bias.node.output.first()?)?;
        if !matches!(layer.op_type(), "Conv" | "ConvTranspose" | "Gemm") || layer.input.get(2) != bias.node.output.first() {
            return None;
        }
        let weight = self.makers.get(layer.input.get(1)?.as_str())?;
        self.quantized(weight).map(|used| used.integers)
    }
}

/// The inputs of a node that may be trained.
fn slots(node: &NodeProto) -> &'static [(usize, Role)] {
    match node.op_type() {
        "Conv" | "ConvTranspose" => &[(1, Role::Weight), (2, Role::Vector)],
        "Gemm" => &[(0, Role::Weight), (1, Role::Weight), (2, Role::Vector)],
        "MatMul" => &[(0, Role::Weight), (1, Role::Weight)],
        "Gather" => &[(0, Role::Table)],
        "BatchNormalization" | "InstanceNormalization" | "LayerNormalization" => &[(1, Role::Vector), (2, Role::Vector)],
        "PRelu" => &[(1, Role::Vector)],
        "Add" | "Sub" | "Mul" | "Div" => &[(0, Role::Vector), (1, Role::Vector)],
        _ => &[],
    }
}

/// Whether a constant of that shape can be what its place in a node suggests. An operand of an addition or multiplication is trained
/// where it holds a value for each channel: single numbers and tables of masks or angles are the graph's own arithmetic.
fn is_trained(node: &NodeProto, role: Role, dims: &[i64]) -> bool {
    let wide = dims.iter().filter(|size| **size > 1).count();
    match role {
        Role::Weight | Role::Table => dims.len() >= 2,
        Role::Vector if matches!(node.op_type(), "Add" | "Sub" | "Mul" | "Div") => wide == 1,
        Role::Vector => true,
    }
}

impl Parameters {
    /// What of `graph` can be trained towards the values `wanted`.
    ///
    /// # Errors
    /// Where a weight cannot be read.
    pub(super) fn find(graph: &GraphProto, wanted: &[String], place: &Place) -> std::result::Result<Self, Failure> {
        let live = live_nodes(graph, wanted);
        let wiring = Wiring::of(graph, &live);
        let mut parameters = Self {
            list: Vec::new(),
            frozen: Vec::new(),
            place: place.clone(),
        };
        let constants = parameters.find_quantized(&live, &wiring)?;
        let mut taken: HashSet<&str> = constants;
        for node in live.iter().filter(|node| is_standard(node)) {
            for (input, role) in slots(node) {
                let origin = node.input.get(*input).and_then(|name| wiring.origin(name));
                let Some(name) = origin.filter(|name| wiring.is_float(name)) else {
                    continue;
                };
                let tensor = wiring.initializers[name];
                if !is_trained(node, *role, &tensor.dims) || !taken.insert(name) {
                    continue;
                }
                let parameter = Parameter::of_floats(tensor, *role, place).map_err(|error| unreadable(name, &error))?;
                parameters.list.push(parameter);
            }
        }
        Ok(parameters)
    }

    /// Finds the weights in integers; returns the scales and zero points, which are trained with their weights or not at all.
    fn find_quantized<'a>(&mut self, live: &[&'a NodeProto], wiring: &Wiring<'a>) -> std::result::Result<HashSet<&'a str>, Failure> {
        let mut constants: HashSet<&str> = HashSet::new();
        let mut order: Vec<&str> = Vec::new();
        let mut uses: HashMap<&str, Vec<Use>> = HashMap::new();
        for &node in live {
            if matches!(node.op_type(), "QuantizeLinear" | "DequantizeLinear") {
                constants.extend(node.input.iter().skip(1).map(String::as_str));
            }
            if let Some(used) = wiring.quantized(node) {
                constants.extend(used.scale.iter().chain(&used.zero));
                let known = uses.entry(used.integers).or_default();
                if known.is_empty() {
                    order.push(used.integers);
                }
                known.push(used);
            }
        }
        // Weights before the biases that follow them.
        order.sort_by_key(|name| wiring.initializers[name].data_type() == DataType::Int32 as i32);
        for name in order {
            match self
                .quantized(&uses[name], wiring, &uses)
                .map_err(|error| unreadable(name, &error))?
            {
                Ok(parameter) => self.list.push(parameter),
                Err(why) => self.frozen.push(skipped(name, why)),
            }
        }
        Ok(constants)
    }

    /// A quantised parameter, or why it is left as it is.
    fn quantized<'a>(
        &self,
        uses: &[Use<'a>],
        wiring: &Wiring<'a>,
        all: &HashMap<&str, Vec<Use<'a>>>,
    ) -> Result<std::result::Result<Parameter, &'static str>> {
        let first = &uses[0];
        let integers = wiring.initializers[first.integers];
        if wiring.readers[first.integers].len() != uses.len() {
            return Ok(Err("something else reads these integers, too"));
        }
        if uses
            .iter()
            .any(|used| attribute(used.node, "block_size").is_some_and(|size| size.i() != 0))
        {
            return Ok(Err("it is quantised in blocks"));
        }
        let scales: Option<Vec<&TensorProto>> = uses.iter().map(|used| wiring.initializers.get(used.scale?).copied()).collect();
        let Some(scales) = scales else {
            return Ok(Err("its scale is not a constant"));
        };
        let zero = match first.zero {
            None => None,
            Some(name) => match wiring.initializers.get(name) {
                Some(zero) => Some(*zero),
                None => return Ok(Err("its zero point is not a constant")),
            },
        };
        let shape = weights::shape(integers).map_err(candle_core::Error::wrap)?;
        let kind = DataType::try_from(integers.data_type()).unwrap_or_default();
        let (least, most) = match kind {
            DataType::Int8 => (-128.0, 127.0),
            DataType::Uint8 => (0.0, 255.0),
            DataType::Int16 => (-32768.0, 32767.0),
            DataType::Uint16 => (0.0, 65535.0),
            DataType::Int32 => (f64::from(i32::MIN), f64::from(i32::MAX)),
            _ => return Ok(Err("its integers are of a type that is not trained")),
        };
        // With the shared axes of size 1.
        let channels = scales[0].dims.iter().product::<i64>() as usize;
        let axis = if first.axis < 0 {
            first.axis + shape.len() as i64
        } else {
            first.axis
        } as usize;
        let mut kept = vec![1; shape.len()];
        if channels > 1 {
            if shape.get(axis) != Some(&channels) {
                return Ok(Err("its scales are not one for each channel"));
            }
            kept[axis] = channels;
        }
        let alike = |used: &Use, scale: &TensorProto| {
            used.zero == first.zero && (channels == 1 || used.axis == first.axis) && scale.dims.iter().product::<i64>() as usize == channels
        };
        if !uses.iter().zip(&scales).all(|(used, scale)| alike(used, scale)) {
            return Ok(Err("its uses disagree about its scale"));
        }
        let shared: Vec<usize> = (0..shape.len()).filter(|axis| kept[*axis] == 1).collect();
        let floats = |tensor: &TensorProto, shape: &[usize]| -> Result<Tensor> {
            let values = weights::floats(tensor).map_err(candle_core::Error::wrap)?;
            Tensor::from_vec(values, shape, &self.place.device)?.to_dtype(self.place.dtype)
        };
        let initial = floats(scales[0], &kept)?;
        let zero = match zero {
            Some(zero) if zero.dims.iter().product::<i64>() as usize == channels => floats(zero, &kept)?,
            Some(_) => return Ok(Err("its zero points are not one for each scale")),
            None => initial.zeros_like()?,
        };
        let holders = uses.iter().zip(&scales).map(|(used, scale)| {
            Ok(Holder {
                name: used.scale.unwrap_or_default().to_owned(),
                dims: weights::shape(scale).map_err(candle_core::Error::wrap)?,
                kind: DataType::try_from(scale.data_type()).unwrap_or_default(),
                factor: floats(scale, &kept)?.div(&initial)?,
            })
        });
        let holders = holders.collect::<Result<Vec<_>>>()?;
        let whole = floats(integers, &shape)?.broadcast_sub(&zero)?;
        let value = whole.broadcast_mul(&initial)?;
        // Each use reads its scale once, or the product that it scales does.
        let foreign = |used: &Use| {
            let own = uses.iter().filter(|other| other.scale == used.scale).count();
            used.scale.is_none_or(|scale| wiring.readers[scale].len() != own)
        };
        let tied = (kind == DataType::Int32).then(|| wiring.weight_of_bias(first)).flatten();
        let tied = tied
            .filter(|weight| all.contains_key(weight))
            .and_then(|weight| self.position(weight));
        let symmetric = is_symmetric(&zero, least)?;
        let scale = match tied {
            Some(to) if self.list[to].channels() == channels || self.list[to].channels() == 1 => Scale::Tied { to },
            _ if kind == DataType::Int32 || uses.iter().any(foreign) => Scale::Fixed,
            _ => refreshed(&value, &shared, symmetric)?,
        };
        let mask = if shape.len() >= 2 { mask_of_integers(&whole)? } else { None };
        let (low, high) = match &scale {
            // The type may hold more than a product of integers bears.
            Scale::Refreshed { .. } if symmetric => {
                let bound = whole.abs()?.flatten_all()?.max(0)?.broadcast_as(zero.shape())?.contiguous()?;
                (bound.neg()?, bound)
            }
            _ => ((zero.neg()? + least)?, (zero.neg()? + most)?),
        };
        let role = if shape.len() >= 2 { Role::Weight } else { Role::Vector };
        Ok(Ok(Parameter {
            name: first.integers.to_owned(),
            var: Var::from_tensor(&value)?,
            mask,
            form: Form::Quantized(Grid {
                kind,
                shared,
                zero,
                low,
                high,
                initial,
                scale,
                holders,
            }),
            role,
        }))
    }

    fn position(&self, name: &str) -> Option<usize> {
        self.list.iter().position(|parameter| parameter.name == name)
    }

    /// How many tensors are trained.
    pub(super) fn len(&self) -> usize {
        self.list.len()
    }

    /// The initialisers whose values [`values`](Self::values) gives.
    pub(super) fn names(&self) -> HashSet<String> {
        let of = |parameter: &Parameter| {
            let holders = match &parameter.form {
                Form::Quantized(grid) => grid.holders.iter().map(|holder| holder.name.clone()).collect(),
                Form::Float(_) => vec![],
            };
            holders.into_iter().chain([parameter.name.clone()]).collect::<Vec<_>>()
        };
        self.list.iter().flat_map(of).collect()
    }

    /// The initialisers as the graph reads them: weights as they are or, where they are quantised, rounded to their grid.
    pub(super) fn values(&self) -> Result<HashMap<String, Tensor>> {
        let mut values = HashMap::new();
        for parameter in &self.list {
            match &parameter.form {
                Form::Float(_) => {
                    values.insert(parameter.name.clone(), parameter.var.as_tensor().clone());
                }
                Form::Quantized(grid) => {
                    let scale = self.scale(parameter, grid)?;
                    let scaled = parameter.var.broadcast_div(&scale)?;
                    let whole = round(&scaled.detach())?
                        .broadcast_maximum(&grid.low)?
                        .broadcast_minimum(&grid.high)?;
                    values.insert(parameter.name.clone(), straight(&scaled, &whole)?.broadcast_add(&grid.zero)?);
                    for holder in &grid.holders {
                        values.insert(holder.name.clone(), scale.mul(&holder.factor)?.reshape(holder.dims.as_slice())?);
                    }
                }
            }
        }
        Ok(values)
    }

    /// The scale that a parameter's values of now ask for; no gradient flows through it.
    fn scale(&self, parameter: &Parameter, grid: &Grid) -> Result<Tensor> {
        match &grid.scale {
            Scale::Fixed => Ok(grid.initial.clone()),
            Scale::Tied { to } => {
                let other = &self.list[*to];
                let Form::Quantized(followed) = &other.form else {
                    return Ok(grid.initial.clone());
                };
                let change = self.scale(other, followed)?.div(&followed.initial)?.flatten_all()?;
                grid.initial.broadcast_mul(&change)
            }
            Scale::Refreshed { largest, smallest } => {
                let value = parameter.var.as_tensor().detach();
                let up = extreme(&value, &grid.shared)?.div(largest)?;
                let down = extreme(&value.neg()?, &grid.shared)?.div(smallest)?;
                let scale = up.maximum(&down)?.mul(&grid.initial)?;
                // A channel of zeros stays zero under any scale.
                scale.gt(0.0)?.where_cond(&scale, &grid.initial)
            }
        }
    }

    /// Copies of all values, to come back to.
    pub(super) fn snapshot(&self) -> Result<Vec<Tensor>> {
        self.list
            .iter()
            .map(|parameter| parameter.var.as_tensor().detach().copy())
            .collect()
    }

    /// Comes back to the values of a [`snapshot`](Self::snapshot).
    pub(super) fn restore(&self, snapshot: &[Tensor]) -> Result<()> {
        self.list
            .iter()
            .zip(snapshot)
            .try_for_each(|(parameter, value)| parameter.var.set(value))
    }

    /// The tensors to take gradients of.
    pub(super) fn vars(&self) -> impl Iterator<Item = &Var> {
        self.list.iter().map(|parameter| &parameter.var)
    }

    /// Each tensor with its mask and with whether it decays.
    pub(super) fn trained(&self) -> impl Iterator<Item = (&Var, Option<&Tensor>, bool)> {
        self.list
            .iter()
            .map(|parameter| (&parameter.var, parameter.mask.as_ref(), parameter.role == Role::Weight))
    }

    /// The share of zeros among the weights that can be pruned, `0.0..=1.0`.
    pub(super) fn sparsity(&self) -> Result<f64> {
        let (mut zeros, mut all) = (0.0, 0_usize);
        for parameter in self.list.iter().filter(|parameter| parameter.role == Role::Weight) {
            zeros += parameter.var.eq(0.0)?.to_dtype(DType::F64)?.sum_all()?.to_scalar::<f64>()?;
            all += parameter.var.elem_count();
        }
        Ok(zeros / all.max(1) as f64)
    }

    /// Zeroes the `share` of weights of smallest magnitude, ranked over all of them together, from now on.
    pub(super) fn prune(&mut self, share: f64) -> Result<()> {
        let mut pruned: Vec<&mut Parameter> = self.list.iter_mut().filter(|parameter| parameter.role == Role::Weight).collect();
        let mut values = Vec::with_capacity(pruned.len());
        for parameter in &pruned {
            values.push(parameter.var.flatten_all()?.to_dtype(DType::F32)?.to_vec1::<f32>()?);
        }
        let mut slices: Vec<&mut [f32]> = values.iter_mut().map(Vec::as_mut_slice).collect();
        prune_magnitude(&mut slices, share).map_err(|_| candle_core::Error::msg("a weight became NaN or infinite"))?;
        for (parameter, values) in pruned.iter_mut().zip(values) {
            let kept: Vec<u8> = values.iter().map(|value| u8::from(*value != 0.0)).collect();
            let kept = Tensor::from_vec(kept, parameter.var.shape(), &self.place.device)?.to_dtype(self.place.dtype)?;
            parameter.var.set(&parameter.var.as_tensor().detach().mul(&kept)?)?;
            parameter.mask = Some(kept);
        }
        Ok(())
    }

    /// Writes the trained values to the initialisers of `graph`, each in the type in which it lies there; returns their names.
    pub(super) fn write(&self, graph: &mut GraphProto) -> Result<Vec<String>> {
        let values = self.values()?;
        let mut kinds: HashMap<&str, DataType> = HashMap::new();
        for parameter in &self.list {
            match &parameter.form {
                Form::Float(kind) => drop(kinds.insert(&parameter.name, *kind)),
                Form::Quantized(grid) => {
                    kinds.insert(&parameter.name, grid.kind);
                    kinds.extend(grid.holders.iter().map(|holder| (holder.name.as_str(), holder.kind)));
                }
            }
        }
        for initializer in &mut graph.initializer {
            let name = initializer.name().to_owned();
            if let (Some(kind), Some(value)) = (kinds.get(name.as_str()), values.get(&name)) {
                let dims: Vec<usize> = initializer.dims.iter().map(|&size| size as usize).collect();
                *initializer = tensor(&name, *kind, &dims, bytes(value, *kind)?);
            }
        }
        Ok(self.list.iter().map(|parameter| parameter.name.clone()).collect())
    }
}

impl Parameter {
    fn of_floats(tensor: &TensorProto, role: Role, place: &Place) -> Result<Self> {
        let value = of_proto(tensor, place)?;
        let mut mask = None;
        if role == Role::Weight {
            let kept = value.ne(0.0)?.to_dtype(place.dtype)?;
            let zeros = 1.0 - mean(&kept)?;
            mask = (zeros > PRUNED_MIN).then_some(kept);
        }
        Ok(Self {
            name: tensor.name().to_owned(),
            var: Var::from_tensor(&value)?,
            mask,
            form: Form::Float(DataType::try_from(tensor.data_type()).unwrap_or_default()),
            role,
        })
    }

    /// How many scales it has.
    fn channels(&self) -> usize {
        match &self.form {
            Form::Quantized(grid) => grid.initial.elem_count(),
            Form::Float(_) => 0,
        }
    }
}

fn mean(x: &Tensor) -> Result<f64> {
    x.to_dtype(DType::F64)?.mean_all()?.to_scalar()
}

/// The largest value of each channel.
fn extreme(x: &Tensor, shared: &[usize]) -> Result<Tensor> {
    shared.iter().try_fold(x.clone(), |x, &axis| x.max_keepdim(axis))
}

/// Whether the zero points lie in the middle of their type's range.
fn is_symmetric(zero: &Tensor, least: f64) -> Result<bool> {
    let middle = if least < 0.0 {
        0.0
    } else {
        zero.flatten_all()?.get(0)?.to_dtype(DType::F64)?.to_scalar::<f64>()?
    };
    let centred = least < 0.0 || middle == 128.0 || middle == 32768.0;
    Ok(centred && mean(&zero.eq(middle)?)? == 1.0)
}

/// The scale by which the integers of each channel's outermost values of now stay where they are.
fn refreshed(value: &Tensor, shared: &[usize], symmetric: bool) -> Result<Scale> {
    let (mut largest, mut smallest) = (extreme(value, shared)?, extreme(&value.neg()?, shared)?);
    if symmetric {
        largest = largest.maximum(&smallest)?;
        smallest = largest.clone();
    }
    // A side without values bounds nothing.
    let nothing = Tensor::full(f64::INFINITY, largest.shape(), value.device())?.to_dtype(value.dtype())?;
    let bound = |reach: Tensor| reach.gt(0.0)?.where_cond(&reach, &nothing);
    Ok(Scale::Refreshed {
        largest: bound(largest)?,
        smallest: bound(smallest)?,
    })
}

/// The mask of a weight in integers, where it has more zeros than rounding makes: a smooth distribution leaves half as many values on 0
/// as on 1 and -1 together.
fn mask_of_integers(whole: &Tensor) -> Result<Option<Tensor>> {
    let kept = whole.ne(0.0)?.to_dtype(whole.dtype())?;
    let (zeros, ones) = (1.0 - mean(&kept)?, mean(&whole.abs()?.eq(1.0)?)?);
    Ok((zeros - ones / 2.0 > PRUNED_MIN).then_some(kept))
}

/// The values in little-endian bytes of a type.
fn bytes(value: &Tensor, kind: DataType) -> Result<Vec<u8>> {
    let values = value.flatten_all()?.to_dtype(DType::F64)?.to_vec1::<f64>()?;
    let whole = |value: f64| value.round_ties_even();
    Ok(match kind {
        DataType::Float => values.iter().flat_map(|&value| (value as f32).to_le_bytes()).collect(),
        DataType::Double => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
        DataType::Float16 => values.iter().flat_map(|&value| f16::from_f64(value).to_le_bytes()).collect(),
        DataType::Bfloat16 => values.iter().flat_map(|&value| bf16::from_f64(value).to_le_bytes()).collect(),
        DataType::Int8 => values.iter().flat_map(|&value| (whole(value) as i8).to_le_bytes()).collect(),
        DataType::Uint8 => values.iter().flat_map(|&value| (whole(value) as u8).to_le_bytes()).collect(),
        DataType::Int16 => values.iter().flat_map(|&value| (whole(value) as i16).to_le_bytes()).collect(),
        DataType::Uint16 => values.iter().flat_map(|&value| (whole(value) as u16).to_le_bytes()).collect(),
        DataType::Int32 => values.iter().flat_map(|&value| (whole(value) as i32).to_le_bytes()).collect(),
        kind => candle_core::bail!("no values of type {} are written", kind.as_str_name()),
    })
}

#[cfg(test)]
mod tests {
    use candle_core::Device;
    use plimsoll_package::recipe::{Quantize, QuantizeScheme};
    use plimsoll_runtime::onnx::{ModelProto, OperatorSetIdProto, ValueInfoProto};

    use super::*;
    use crate::compress::{Setting, quantize};
    use crate::graph::{float_tensor, integer, node};
    use crate::progress::Console;

    fn place() -> Place {
        Place {
            device: Device::Cpu,
            dtype: DType::F32,
        }
    }

    fn model(nodes: Vec<NodeProto>, initializers: Vec<TensorProto>) -> ModelProto {
        let value = |name: &str| ValueInfoProto {
            name: Some(name.into()),
            ..ValueInfoProto::default()
        };
        ModelProto {
            opset_import: vec![OperatorSetIdProto {
                domain: None,
                version: Some(17),
            }],
            graph: Some(GraphProto {
                node: nodes,
                initializer: initializers,
                input: vec![value("x")],
                output: vec![value("y")],
                ..GraphProto::default()
            }),
            ..ModelProto::default()
        }
    }

    fn weight() -> TensorProto {
        let values: Vec<f32> = (0..64 * 48)
            .map(|index| ((index * 37 % 101) as f32 - 50.0) * 0.01 * (1.0 + (index % 48) as f32))
            .collect();
        float_tensor("w", &[64, 48], &values)
    }

    fn quantized(scheme: QuantizeScheme) -> GraphProto {
        let mut model = model(
            vec![node("Gemm", &["x", "w", "b"], "y", vec![])],
            vec![weight(), float_tensor("b", &[48], &[0.5; 48])],
        );
        let original = model.clone();
        let console = Console::silent();
        let setting = Setting {
            calibration: None,
            original: &original,
            threads: 1,
            engine: None,
            console: &console,
        };
        quantize::technique(&Quantize::of(scheme))
            .unwrap()
            .apply(&mut model, &setting)
            .unwrap();
        model.graph.unwrap()
    }

    fn find(graph: &GraphProto) -> Parameters {
        Parameters::find(graph, &["y".to_owned()], &place()).unwrap()
    }

    fn initializer<'a>(graph: &'a GraphProto, part: &str) -> &'a TensorProto {
        graph.initializer.iter().find(|tensor| tensor.name().contains(part)).unwrap()
    }

    #[test]
    fn a_quantised_weight_is_unchanged_before_training_and_refreshed_after() {
        for scheme in [QuantizeScheme::Int8Weights, QuantizeScheme::Int8Dynamic] {
            let mut graph = quantized(scheme);
            let before = graph.clone();
            let parameters = find(&graph);
            assert!(parameters.frozen.is_empty(), "{:?}", parameters.frozen);
            assert_eq!(parameters.len(), 2, "the weight and the bias");
            parameters.write(&mut graph).unwrap();
            for name in ["int8", "scale"] {
                let (now, then) = (initializer(&graph, name), initializer(&before, name));
                assert_eq!(weights::floats(now).unwrap(), weights::floats(then).unwrap(), "{scheme} {name}");
            }
            // Each channel grows by its own factor: the integers stay, the scales follow.
            let trained = &parameters.list[0];
            let factors: Vec<f32> = (0..48).map(|channel| 1.0 + channel as f32 / 10.0).collect();
            let grown = trained
                .var
                .as_tensor()
                .broadcast_mul(&Tensor::from_vec(factors.clone(), 48, &Device::Cpu).unwrap())
                .unwrap();
            trained.var.set(&grown.detach()).unwrap();
            parameters.write(&mut graph).unwrap();
            let integers = weights::floats(initializer(&graph, "int8")).unwrap();
            assert_eq!(integers, weights::floats(initializer(&before, "int8")).unwrap());
            let scales = weights::floats(initializer(&graph, "scale")).unwrap();
            let expected = weights::floats(initializer(&before, "scale")).unwrap();
            for ((scale, before), factor) in scales.iter().zip(expected).zip(factors) {
                assert!((scale / before - factor).abs() < 1e-5, "{scale} from {before} by {factor}");
            }
        }
    }

    #[test]
    fn zeros_that_pruning_made_are_masked_and_those_of_rounding_are_not() {
        let mask = |integers: &[f32]| mask_of_integers(&Tensor::new(integers, &Device::Cpu).unwrap()).unwrap();
        // As many on 0 as on each of its neighbours.
        let smooth: Vec<f32> = (0..300).map(|index| (index % 21) as f32 - 10.0).collect();
        assert!(mask(&smooth).is_none());
        let pruned: Vec<f32> = smooth.iter().map(|value| if value.abs() < 4.0 { 0.0 } else { *value }).collect();
        let found = mask(&pruned).unwrap().to_vec1::<f32>().unwrap();
        assert!(pruned.iter().zip(found).all(|(value, mask)| (*value != 0.0) == (mask == 1.0)));
        // In floats a zero is no accident.
        let mut values: Vec<f32> = (1..=100).map(|value| value as f32).collect();
        let whole = |values: &[f32]| {
            find(
                &model(
                    vec![node("MatMul", &["x", "w"], "y", vec![])],
                    vec![float_tensor("w", &[10, 10], values)],
                )
                .graph
                .unwrap(),
            )
        };
        assert!(whole(&values).list[0].mask.is_none());
        values[..2].fill(0.0);
        assert_eq!(mean(whole(&values).list[0].mask.as_ref().unwrap()).unwrap(), 0.98);
    }

    #[test]
    fn gradual_pruning_keeps_what_was_pruned() {
        let values: Vec<f32> = (0..100).map(|value| if value < 30 { 0.0 } else { value as f32 }).collect();
        let graph = model(
            vec![node("MatMul", &["x", "w"], "y", vec![])],
            vec![float_tensor("w", &[10, 10], &values)],
        )
        .graph
        .unwrap();
        let mut parameters = find(&graph);
        assert!((parameters.sparsity().unwrap() - 0.3).abs() < 1e-9);
        parameters.prune(0.6).unwrap();
        assert!((parameters.sparsity().unwrap() - 0.6).abs() < 1e-9);
        let values = parameters.values().unwrap()["w"].flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert!(values[..60].iter().all(|value| *value == 0.0) && values[60..].iter().all(|value| *value != 0.0));
    }

    #[test]
    fn constants_of_the_graphs_own_arithmetic_are_not_trained() {
        let nodes = vec![
            node("Mul", &["x", "half"], "a", vec![]),
            node("Add", &["a", "mask"], "b", vec![]),
            node("Gather", &["table", "x"], "t", vec![]),
            node("Transpose", &["w"], "turned", vec![]),
            node("MatMul", &["b", "turned"], "c", vec![]),
            node("Add", &["c", "bias"], "d", vec![]),
            node("Add", &["d", "t"], "y", vec![]),
            node("MatMul", &["d", "unread"], "dead", vec![]),
        ];
        let initializers = vec![
            float_tensor("half", &[1], &[0.5]),
            float_tensor("mask", &[2, 2], &[0.0; 4]),
            float_tensor("table", &[4, 2], &[1.0; 8]),
            float_tensor("w", &[2, 2], &[1.0; 4]),
            float_tensor("bias", &[1, 2], &[0.0; 2]),
            float_tensor("unread", &[2, 2], &[1.0; 4]),
        ];
        let parameters = find(&model(nodes, initializers).graph.unwrap());
        let expected = ["table", "w", "bias"].map(str::to_owned);
        assert_eq!(parameters.names(), HashSet::from(expected));
        assert!(
            parameters.list.iter().all(|parameter| parameter.mask.is_none()),
            "a bias of zeros is no pruned weight"
        );
    }

    #[test]
    fn a_bias_in_integers_follows_the_scale_of_its_weight() {
        let nodes = vec![
            node("DequantizeLinear", &["w", "w_scale"], "w_float", vec![integer("axis", 0)]),
            node("DequantizeLinear", &["b", "b_scale"], "b_float", vec![integer("axis", 0)]),
            node("Conv", &["x", "w_float", "b_float"], "y", vec![]),
        ];
        let bias: Vec<u8> = [1000_i32, -2000].iter().flat_map(|value| value.to_le_bytes()).collect();
        let initializers = vec![
            tensor(
                "w",
                DataType::Int8,
                &[2, 1, 1, 2],
                [127_i8, 3, -127, 50].map(|value| value as u8).to_vec(),
            ),
            float_tensor("w_scale", &[2], &[0.1, 0.2]),
            tensor("b", DataType::Int32, &[2], bias),
            float_tensor("b_scale", &[2], &[0.001, 0.002]),
        ];
        let mut graph = model(nodes, initializers).graph.unwrap();
        let parameters = find(&graph);
        assert_eq!(parameters.len(), 2);
        let doubled = parameters.list[0].var.as_tensor().detach().affine(2.0, 0.0).unwrap();
        parameters.list[0].var.set(&doubled).unwrap();
        parameters.write(&mut graph).unwrap();
        let floats = |name: &str| weights::floats(graph.initializer.iter().find(|tensor| tensor.name() == name).unwrap()).unwrap();
        assert_eq!(floats("w"), [127.0, 3.0, -127.0, 50.0]);
        for (now, expected) in floats("w_scale").iter().chain(&floats("b_scale")).zip([0.2, 0.4, 0.002, 0.004]) {
            assert!((now - expected).abs() < 1e-6);
        }
        // The bias itself is the same at the doubled scale.
        assert_eq!(floats("b"), [500.0, -1000.0]);
    }
}
