// Train what `edgetune ship --target ios` laid out, with ONNX Runtime's Objective-C API (pod onnxruntime-objc, or the
// Swift package): read target.json, run the step, feed its gradients to the optimizer, swap the states.
//
// NOT COMPILED HERE: there is no Xcode where edgetune is tested. It does step by step what train.cpp does, which is
// compiled and compared. Add the shipped folder to the app as a folder reference and pass Bundle.main's URL of it; call
// it from a background task.

import Foundation
import onnxruntime_objc  // with the Swift package: OnnxRuntimeBindings

struct Shipped: Decodable {
    struct Tensor: Decodable { let name, kind: String }
    struct Graph: Decodable { let role, file: String; let inputs, outputs: [Tensor] }
    struct Adapter: Decodable { let file, prefix: String }
    struct Tokenizer: Decodable { let pad_token_id: Int64 }
    struct Optimizer: Decodable { let learning_rate, weight_decay, max_grad_norm: Float }
    struct Rope: Decodable {
        let dim, original_max_position_embeddings: Int
        let theta, attention_factor: Double
        let short_factor, long_factor: [Double]?
    }
    struct Architecture: Decodable { let sliding_window: Int?; let rope: Rope }

    let format: String
    let format_version: Int
    let graphs: [Graph]
    let adapter: Adapter
    let tokenizer: Tokenizer
    let optimizer: Optimizer
    let architecture: Architecture
}

struct Row: Decodable { let input_ids, labels: [Int64] }

enum TrainingError: Error { case anotherFormat, notFloat32(String), notFinite }

/// Float values and their shape.
struct Floats {
    var shape: [Int]
    var values: [Float]

    init(_ shape: [Int], _ values: [Float]? = nil) {
        self.shape = shape
        self.values = values ?? [Float](repeating: 0, count: shape.reduce(1, *))
    }
}

final class Graph {
    private let described: Shipped.Graph
    private let session: ORTSession

    init(_ environment: ORTEnv, _ folder: URL, _ shipped: Shipped, _ role: String) throws {
        described = shipped.graphs.first { $0.role == role }!
        let path = folder.appendingPathComponent(described.file).path
        session = try ORTSession(env: environment, modelPath: path, sessionOptions: nil)
    }

    func run(_ inputs: [String: ORTValue]) throws -> [String: Floats] {
        let wanted = Dictionary(uniqueKeysWithValues: described.inputs.map { ($0.name, inputs[$0.name]!) })
        let names = Set(described.outputs.map(\.name))
        return try session.run(withInputs: wanted, outputNames: names, runOptions: nil).mapValues { value in
            let shape = try value.tensorTypeAndShapeInfo().shape.map(\.intValue)
            let data = try value.tensorData() as Data
            return Floats(shape, data.withUnsafeBytes { Array($0.bindMemory(to: Float.self)) })
        }
    }
}

final class Trainer {
    private let shipped: Shipped
    private let environment: ORTEnv
    private let step, adamw: Graph
    /// By graph input: every LoRA parameter and its two moments.
    private var state: [String: Floats]
    private let parameters: [String]
    private var stepsDone = 0

    init(folder: URL) throws {
        shipped = try JSONDecoder().decode(
            Shipped.self, from: Data(contentsOf: folder.appendingPathComponent("target.json")))
        guard shipped.format == "edgetune-target", shipped.format_version == 1 else { throw TrainingError.anotherFormat }
        environment = try ORTEnv(loggingLevel: .warning)
        step = try Graph(environment, folder, shipped, "step")
        adamw = try Graph(environment, folder, shipped, "adamw")
        state = try Trainer.readAdapter(folder.appendingPathComponent(shipped.adapter.file), shipped.adapter.prefix)
        parameters = state.keys.sorted()
        for name in parameters {
            state[name + ".exp_avg"] = Floats(state[name]!.shape)
            state[name + ".exp_avg_sq"] = Floats(state[name]!.shape)
        }
    }

    /// One optimizer step on some rows; returns their loss before it. A step that is not finite changes nothing.
    func train(_ rows: [Row], learningRate: Float, weightDecay: Float = 0) throws -> Float {
        var inputs = try tokens(rows)
        let scalars: [String: Float] = [
            "loss_scale": 1, "learning_rate": learningRate, "weight_decay": weightDecay,
            "max_grad_norm": shipped.optimizer.max_grad_norm, "step": Float(stepsDone + 1),
        ]
        for (name, value) in scalars { inputs[name] = try tensor(Floats([1], [value])) }
        for (name, value) in state.merging(tables(rows), uniquingKeysWith: { _, new in new }) {
            inputs[name] = try tensor(value)
        }
        let gradients = try step.run(inputs)
        for (name, value) in gradients { inputs[name] = try tensor(value) }
        let updated = try adamw.run(inputs)
        let loss = gradients["loss"]!.values[0]
        guard loss.isFinite, updated["grad_norm"]!.values[0].isFinite else { throw TrainingError.notFinite }
        for name in state.keys { state[name] = updated[name + ".next"]! }
        stepsDone += 1
        return loss
    }

    /// Write the adapter in PEFT's format: the length of a JSON header, the header, the bytes.
    func save(to file: URL) throws {
        var header: [String: Any] = [:]
        var bytes = Data()
        for name in parameters {
            let value = state[name]!, start = bytes.count
            value.values.withUnsafeBytes { bytes.append(contentsOf: $0) }
            header[shipped.adapter.prefix + name] = [
                "dtype": "F32", "shape": value.shape, "data_offsets": [start, bytes.count],
            ] as [String: Any]
        }
        var text = try JSONSerialization.data(withJSONObject: header)
        text.append(Data(repeating: UInt8(ascii: " "), count: (8 - text.count % 8) % 8))
        let length = withUnsafeBytes(of: UInt64(text.count).littleEndian) { Data($0) }
        try (length + text + bytes).write(to: file, options: .atomic)
    }

    private func tensor(_ value: Floats) throws -> ORTValue {
        let data = value.values.withUnsafeBytes { NSMutableData(bytes: $0.baseAddress, length: $0.count) }
        return try ORTValue(tensorData: data, elementType: .float, shape: value.shape.map { NSNumber(value: $0) })
    }

    private func tokens(_ rows: [Row]) throws -> [String: ORTValue] {
        let longest = rows.map(\.input_ids.count).max()!
        var ids: [Int64] = [], labels: [Int64] = []
        for row in rows {
            let rest = longest - row.input_ids.count
            ids += row.input_ids + [Int64](repeating: shipped.tokenizer.pad_token_id, count: rest)
            // The label of a position is the token that shall follow it.
            labels += row.labels.dropFirst() + [Int64](repeating: -100, count: rest + 1)
        }
        return try ["input_ids": ids, "labels": labels].mapValues { values in
            let data = values.withUnsafeBytes { NSMutableData(bytes: $0.baseAddress, length: $0.count) }
            let shape = [NSNumber(value: rows.count), NSNumber(value: longest)]
            return try ORTValue(tensorData: data, elementType: .int64, shape: shape)
        }
    }

    private func tables(_ rows: [Row]) -> [String: Floats] {
        let rope = shipped.architecture.rope, longest = rows.map(\.input_ids.count).max()!
        let window = shipped.architecture.sliding_window ?? longest
        var bias = Floats([rows.count, 1, longest, longest])
        for i in bias.values.indices {
            let query = i / longest % longest, key = i % longest
            bias.values[i] = key <= query && key > query - window ? 0 : -1e4
        }
        let factors = longest > rope.original_max_position_embeddings ? rope.long_factor : rope.short_factor
        var cosines = Floats([rows.count, longest, rope.dim]), sines = cosines
        for i in cosines.values.indices {
            let position = i / rope.dim % longest, pair = i % (rope.dim / 2)
            let frequency = (factors?[pair] ?? 1) * pow(rope.theta, 2 * Double(pair) / Double(rope.dim))
            cosines.values[i] = Float(cos(Double(position) / frequency) * rope.attention_factor)
            sines.values[i] = Float(sin(Double(position) / frequency) * rope.attention_factor)
        }
        return ["attn_bias": bias, "rope_cos": cosines, "rope_sin": sines]
    }

    private static func readAdapter(_ file: URL, _ prefix: String) throws -> [String: Floats] {
        let data = try Data(contentsOf: file, options: .alwaysMapped)
        let length = Int(UInt64(littleEndian: data.withUnsafeBytes { $0.loadUnaligned(as: UInt64.self) }))
        let header = try JSONSerialization.jsonObject(with: data[8..<8 + length]) as! [String: [String: Any]]
        var tensors: [String: Floats] = [:]
        for (name, entry) in header where name != "__metadata__" {
            guard entry["dtype"] as? String == "F32" else { throw TrainingError.notFloat32(name) }
            let place = entry["data_offsets"] as! [Int]
            let bytes = Data(data[8 + length + place[0]..<8 + length + place[1]])
            let values = bytes.withUnsafeBytes { Array($0.bindMemory(to: Float.self)) }
            tensors[String(name.dropFirst(prefix.count))] = Floats(entry["shape"] as! [Int], values)
        }
        return tensors
    }
}

/// Three epochs of rows that `edgetune preview --json` wrote.
func personalise(folder: URL, rows: URL, adapter: URL) throws {
    let lines = try String(contentsOf: rows, encoding: .utf8).split(separator: "\n")
    let read = try lines.map { try JSONDecoder().decode(Row.self, from: Data($0.utf8)) }
    let trainer = try Trainer(folder: folder)
    for _ in 0..<3 {
        for start in stride(from: 0, to: read.count, by: 4) {
            let batch = Array(read[start..<min(start + 4, read.count)])
            print("loss", try trainer.train(batch, learningRate: 2e-4))
        }
    }
    try trainer.save(to: adapter)
}
