// Measures a package that `loraduct package --shapes 1,64` built, and writes what
// `loraduct bench --calibrate measured.json` reads. iOS 18, macOS 15, Swift 5 mode.
// It was neither compiled nor run by our tests, which run on Linux.
//
//     let file = try await measure(
//         package: Bundle.main.url(forResource: "app", withExtension: "mlmodelc")!,
//         function: "base", context: 512, prompt: 128, generate: 64)
//
// Xcode compiles an .mlpackage of the app's to the .mlmodelc. `context` is the one it was built with.

import CoreML
import Foundation

struct Point: Codable {
    let context: Int, prompt_tokens: Int
    let ms_per_prompt_token: Double, tokens_per_second: Double
}

struct Measured: Codable {
    let schema: Int, device: String, engine: String
    let points: [Point]
}

/// A phone's identifier, such as iPhone16,1; of a Mac its chip, such as Apple M4.
func identifier() -> String {
    #if os(macOS)
    let name = "machdep.cpu.brand_string"
    #else
    let name = "hw.machine"
    #endif
    var size = 0
    guard sysctlbyname(name, nil, &size, nil, 0) == 0, size > 0 else { return "unknown" }
    var value = [CChar](repeating: 0, count: size)
    guard sysctlbyname(name, &value, &size, nil, 0) == 0 else { return "unknown" }
    return String(cString: value)
}

/// The inputs of one call of `q` tokens, the first at `position`; causalMask is FLOAT16 [1, 1, q, context].
func inputs(q: Int, position: Int, context: Int) throws -> MLFeatureProvider {
    let ids = try MLMultiArray(shape: [1, NSNumber(value: q)], dataType: .int32)
    let mask = try MLMultiArray(
        shape: [1, 1, NSNumber(value: q), NSNumber(value: context)], dataType: .float16)
    let place = try MLMultiArray(shape: [1], dataType: .int32)
    place[0] = NSNumber(value: position)
    let seen = NSNumber(value: Float(0)), hidden = NSNumber(value: -Float.infinity)
    for row in 0..<q {
        ids[row] = NSNumber(value: 5 + (position + row) % 90)  // any token costs the same
        for column in 0..<context {
            mask[row * context + column] = column <= position + row ? seen : hidden
        }
    }
    return try MLDictionaryFeatureProvider(dictionary: [
        "inputIds": ids, "causalMask": mask, "position": place,
    ])
}

func median(_ values: [Double]) -> Double {
    let sorted = values.sorted()
    return (sorted[(sorted.count - 1) / 2] + sorted[sorted.count / 2]) / 2
}

/// `prompt` is a multiple of 64. Returns where the file was written.
func measure(package: URL, function: String, context: Int, prompt: Int, generate: Int,
             units: MLComputeUnits = .cpuAndNeuralEngine, rounds: Int = 5) async throws -> URL {
    precondition(prompt > 0 && prompt % 64 == 0 && generate > 0 && rounds > 0)
    precondition(prompt + generate <= context)
    precondition(units == .cpuAndNeuralEngine || units == .cpuAndGPU)  // the file names one engine
    func model(_ q: Int) async throws -> MLModel {
        let configuration = MLModelConfiguration()
        configuration.computeUnits = units
        configuration.functionName = "\(function)_q\(q)"
        return try await MLModel.load(contentsOf: package, configuration: configuration)
    }
    let reading = try await model(64)
    let writing = try await model(1)
    let clock = ContinuousClock()
    func milliseconds(since start: ContinuousClock.Instant) -> Double {
        let took = start.duration(to: clock.now).components
        return Double(took.seconds) * 1e3 + Double(took.attoseconds) / 1e15
    }
    var prompts: [Double] = [], tokens: [Double] = []
    for round in 0...rounds {
        // A state belongs to one model; what the cache holds doesn't change the time.
        let one = reading.makeState(), two = writing.makeState()
        // Inputs are made before the clock starts: filling a mask from Swift is slow.
        let pieces = try stride(from: 0, to: prompt, by: 64).map {
            try inputs(q: 64, position: $0, context: context)
        }
        let steps = try (0..<generate).map { try inputs(q: 1, position: prompt + $0, context: context) }
        let start = clock.now
        for piece in pieces { _ = try await reading.prediction(from: piece, using: one) }
        let read = milliseconds(since: start)
        var each: [Double] = []
        for step in steps {
            let before = clock.now
            _ = try await writing.prediction(from: step, using: two)
            each.append(milliseconds(since: before))
        }
        if round > 0 {  // the first warms up
            prompts.append(read / Double(prompt))
            tokens.append(median(each))
        }
    }
    let point = Point(context: context, prompt_tokens: prompt, ms_per_prompt_token: median(prompts),
                      tokens_per_second: 1e3 / median(tokens))
    let engine = units == .cpuAndGPU ? "coreml-gpu" : "coreml-ane"
    let found = Measured(schema: 1, device: identifier(), engine: engine, points: [point])
    let file = URL.documentsDirectory.appending(path: "measured.json")
    let encoder = JSONEncoder()
    encoder.outputFormatting = [.prettyPrinted, .sortedKeys]
    try encoder.encode(found).write(to: file)
    return file
}
