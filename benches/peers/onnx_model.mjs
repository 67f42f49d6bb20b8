// A one-node attention model as ONNX bytes: just enough protobuf to say it.

const varint = n => {
  const bytes = []
  for (n = BigInt(n); n > 127n; n >>= 7n) bytes.push(Number(n & 127n) | 128)
  return Buffer.from([...bytes, Number(n)])
}
const int = (field, value) => Buffer.concat([varint(field << 3), varint(value)])
const bytes = (field, ...parts) => {
  const body = Buffer.concat(parts)
  return Buffer.concat([varint((field << 3) | 2), varint(body.length), body])
}
const text = (field, value) => bytes(field, Buffer.from(value))

// onnx.proto3's TensorProto.DataType
export const TYPES = { float32: 1, int32: 6, int64: 7, float16: 10 }

// ValueInfoProto { name = 1, type = 2 { tensor_type = 1 { elem_type = 1, shape = 2 { dim = 1 { dim_value = 1 } } } } }
const value = ({ name, type, dims }) =>
  [text(1, name), bytes(2, bytes(1, int(1, TYPES[type]), bytes(2, ...dims.map(d => bytes(1, int(1, d))))))]
// TensorProto { dims = 1, data_type = 2, name = 8, raw_data = 9 }
const int64s = (name, values) => [int(1, values.length), int(2, TYPES.int64), text(8, name),
  bytes(9, Buffer.from(new BigInt64Array(values.map(BigInt)).buffer))]
// AttributeProto { name = 1, i = 3, type = 20 (INT = 2) }
const attribute = ([name, n]) => bytes(5, text(1, name), int(3, n), int(20, 2))
// NodeProto { input = 1, output = 2, op_type = 4, attribute = 5, domain = 7 }
const node = ({ op, domain = '', inputs, outputs, attributes = {} }) =>
  [...inputs.map(i => text(1, i)), ...outputs.map(o => text(2, o)), text(4, op),
    ...Object.entries(attributes).map(attribute), text(7, domain)]

// ModelProto { ir_version = 1, graph = 7 { node = 1, name = 2, initializer = 5, input = 11, output = 12 },
// opset_import = 8 { domain = 1, version = 2 } }
export const model = ({ nodes, constants = {}, inputs, outputs }) => Buffer.concat([
  int(1, 10),
  bytes(7, ...nodes.map(n => bytes(1, ...node(n))), text(2, 'attention'),
    ...Object.entries(constants).map(([name, values]) => bytes(5, ...int64s(name, values))),
    ...inputs.map(i => bytes(11, ...value(i))), ...outputs.map(o => bytes(12, ...value(o)))),
  bytes(8, text(1, ''), int(2, 23)),
  bytes(8, text(1, 'com.microsoft'), int(2, 1)),
])
