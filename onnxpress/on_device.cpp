// Opens a bundle's model with ONNX Runtime's C++ API and compares its golden answers. This file is the bundle's run.cpp.
//
//     run model/DEVICE          a line for each golden output and a verdict; exit code 0 good, 1 not good, 2 not readable
//
// Needs C++17, ONNX Runtime, and nlohmann/json. It compares no digests and makes no tokens of text: run.py does.
#include <nlohmann/json.hpp>
#include <onnxruntime_cxx_api.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <map>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

using nlohmann::json;

struct Tensor {
    ONNXTensorElementDataType type;
    std::vector<int64_t> shape;
    std::vector<char> bytes;
};

struct Case {
    std::map<std::string, Tensor> inputs, outputs;  // by name
};

struct Kind {
    ONNXTensorElementDataType type;
    uint64_t size;  // bytes of an element
};

const std::map<std::string, Kind> kinds = {
    {"F32", {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, 4}},   {"F64", {ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE, 8}},
    {"F16", {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16, 2}}, {"I64", {ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64, 8}},
    {"I32", {ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32, 4}},   {"I16", {ONNX_TENSOR_ELEMENT_DATA_TYPE_INT16, 2}},
    {"I8", {ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8, 1}},     {"U64", {ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT64, 8}},
    {"U32", {ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT32, 4}},  {"U16", {ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT16, 2}},
    {"U8", {ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8, 1}},    {"BOOL", {ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL, 1}},
};

std::vector<char> read(const std::filesystem::path& path) {
    std::ifstream file(path, std::ios::binary);
    std::vector<char> content{std::istreambuf_iterator<char>(file), {}};
    if (!file.is_open() || file.bad()) throw std::runtime_error(path.string() + " cannot be read");
    return content;
}

// A safetensors file: 8 bytes with the length of a JSON header, the header, the bytes that it points into; little-endian.
std::map<std::string, Case> read_golden(const std::filesystem::path& path) {
    const std::vector<char> file = read(path);
    uint64_t length = 0;
    if (file.size() >= 8) std::memcpy(&length, file.data(), 8);
    if (file.size() < 8 || length > file.size() - 8) throw std::runtime_error(path.string() + " is cut short");
    const char* const data = file.data() + 8 + length;
    const uint64_t size = file.size() - 8 - length;
    std::map<std::string, Case> cases;
    const json header = json::parse(file.data() + 8, data);
    for (const auto& [key, entry] : header.items()) {
        if (key == "__metadata__") continue;
        const Kind kind = kinds.at(entry.at("dtype").get<std::string>());
        const auto shape = entry.at("shape").get<std::vector<uint64_t>>();
        const auto [begin, end] = entry.at("data_offsets").get<std::pair<uint64_t, uint64_t>>();
        uint64_t bytes = kind.size;
        for (const uint64_t axis : shape) {
            if (axis != 0 && bytes > size / axis) throw std::runtime_error(path.string() + " is cut short at " + key);
            bytes *= axis;
        }
        const size_t first = key.find('.'), second = key.find('.', first + 1);  // "input.CASE.NAME" or "output.CASE.NAME"
        const std::string part = key.substr(0, first);
        if (begin > end || end > size || end - begin != bytes)
            throw std::runtime_error(path.string() + " is cut short at " + key);
        if (second == std::string::npos || (part != "input" && part != "output"))
            throw std::runtime_error(path.string() + " holds " + key + ", which is no golden input or output");
        Case& place = cases[key.substr(first + 1, second - first - 1)];
        (part == "input" ? place.inputs : place.outputs)[key.substr(second + 1)] =
            Tensor{kind.type, {shape.begin(), shape.end()}, {data + begin, data + end}};
    }
    if (cases.empty()) throw std::runtime_error(path.string() + " holds nothing to compare with");
    return cases;
}

constexpr double MASKED = 500;

// The largest of floats; of other numbers the share that is not equal.
// What is expected to be larger than `size` (a mask, -1e9) may differ by as large a share of itself as a number of this size.
// An expected infinity is a masked answer, for which any of its sign from MASKED on will do.
template <typename Number>
double difference_of(const void* found, const std::vector<char>& expected, const double size) {
    const size_t count = expected.size() / sizeof(Number);
    double largest = 0, others = 0;
    for (size_t place = 0; place < count; ++place) {
        Number one, other;
        std::memcpy(&one, static_cast<const char*>(found) + place * sizeof(Number), sizeof(Number));
        std::memcpy(&other, expected.data() + place * sizeof(Number), sizeof(Number));
        if (one == other) continue;
        const double wanted = static_cast<double>(other);
        if (std::isinf(wanted) && std::copysign(1.0, wanted) * static_cast<double>(one) >= MASKED) continue;
        ++others;
        const double share = std::isfinite(wanted) && std::abs(wanted) > size ? size / std::abs(wanted) : 1;
        const double difference = std::abs(static_cast<double>(one) - wanted) * share;
        if (!(difference <= largest)) largest = difference;  // a NaN stays
        if (std::isnan(difference)) break;
    }
    return std::is_floating_point_v<Number> || others == 0 ? largest : others / static_cast<double>(count);
}

// Infinite where type or shape are others.
double difference(const Ort::Value& found, const Tensor& expected, const double size) {
    const auto info = found.GetTensorTypeAndShapeInfo();
    if (info.GetElementType() != expected.type || info.GetShape() != expected.shape) return HUGE_VAL;
    const void* const data = found.GetTensorRawData();
    switch (expected.type) {
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT: return difference_of<float>(data, expected.bytes, size);
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE: return difference_of<double>(data, expected.bytes, size);
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64: return difference_of<int64_t>(data, expected.bytes, size);
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32: return difference_of<int32_t>(data, expected.bytes, size);
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT16: return difference_of<int16_t>(data, expected.bytes, size);
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8: return difference_of<int8_t>(data, expected.bytes, size);
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT64: return difference_of<uint64_t>(data, expected.bytes, size);
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT32: return difference_of<uint32_t>(data, expected.bytes, size);
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT16: return difference_of<uint16_t>(data, expected.bytes, size);
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8:
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL: return difference_of<uint8_t>(data, expected.bytes, size);
        default: throw std::runtime_error("outputs of 16-bit floats are not compared here");
    }
}

// Runs one case and prints how far its outputs are from the golden ones; whether all are within their tolerance.
bool check(Ort::Session& session, const std::string& name, Case& golden, const json& allowances) {
    const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
    std::vector<const char*> input_names, output_names;
    std::vector<Ort::Value> inputs;
    for (auto& [input, tensor] : golden.inputs) {
        input_names.push_back(input.c_str());
        inputs.push_back(Ort::Value::CreateTensor(memory, tensor.bytes.data(), tensor.bytes.size(), tensor.shape.data(),
                                                  tensor.shape.size(), tensor.type));
    }
    for (const auto& entry : golden.outputs) output_names.push_back(entry.first.c_str());
    const auto found = session.Run(Ort::RunOptions{}, input_names.data(), inputs.data(), inputs.size(), output_names.data(),
                                   output_names.size());
    bool good = true;
    size_t place = 0;
    for (const auto& [output, expected] : golden.outputs) {
        const double size = allowances.contains("golden_size") ? allowances["golden_size"].value(output, HUGE_VAL) : HUGE_VAL;
        const double far = difference(found[place++], expected, size);
        const double allowed = allowances.at("golden_tolerance").at(output).get<double>();
        const bool within = far <= allowed;
        std::cout << (within ? "ok   golden " : "BAD  golden ") << name << "  " << output << ": difference " << far
                  << " (allowed " << allowed << ")\n";
        good = good && within;
    }
    return good;
}

// Whether this CPU has AVX512-VNNI. Where that cannot be told, no: the answer is right either way, with VNNI it comes later.
bool has_vnni() {
#if defined(__x86_64__) && defined(__GNUC__)
    return __builtin_cpu_supports("avx512vnni");
#else
    return false;
#endif
}

int main(int count, char** arguments) try {
    if (count != 2) throw std::runtime_error("usage: run FOLDER (of model.onnx, manifest.json and golden.safetensors)");
    const std::filesystem::path folder = arguments[1];
    const std::vector<char> text = read(folder / "manifest.json");
    const json manifest = json::parse(text.begin(), text.end());
    if (OrtGetApiBase()->GetApi(ORT_API_VERSION) == nullptr)
        throw std::runtime_error("this ONNX Runtime is older than the headers that this was compiled with");
    std::string disabled;  // what the build found slow or wrong among ONNX Runtime's own fusions
    for (const auto& optimizer : manifest.at("session").value("disabled_optimizers", json::array()))
        disabled += (disabled.empty() ? "" : ";") + optimizer.get<std::string>();
    Ort::Env environment(ORT_LOGGING_LEVEL_ERROR, "run");
    Ort::SessionOptions options;
    if (!disabled.empty()) options.AddConfigEntry("optimization.disable_specified_optimizers", disabled.c_str());
    // Without VNNI, kernels for signed weights of 8 bits add two products in 16 bits, which overflow: others are asked for.
    if (manifest.at("session").value("exact_products", false) && !has_vnni())
        options.AddConfigEntry("session.x64quantprecision", "1");
    const auto model = folder / (std::filesystem::exists(folder / "model.ort") ? "model.ort" : "model.onnx");  // Android: .ort
    Ort::Session session(environment, model.c_str(), options);
    bool good = true;
    auto cases = read_golden(folder / "golden.safetensors");
    for (auto& [name, golden] : cases) good = check(session, name, golden, manifest.at("options")) && good;
    std::cout << "verdict: " << (good ? "good" : "NOT GOOD") << "\n";
    return good ? 0 : 1;
} catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 2;
}
