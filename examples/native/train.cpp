// Train what `edgetune ship` laid out, with ONNX Runtime's C++ API: read target.json, run the step, feed its gradients
// to the optimizer, swap the states. Compiled and compared with PyTorch by `make test-native`.
//
//   edgetune ship BUNDLE --target linux-arm64 --output shipped
//   edgetune preview BUNDLE --data train.jsonl --json > rows.jsonl
//   c++ -std=c++20 -O2 train.cpp -lonnxruntime -o train       # headers: onnxruntime_cxx_api.h, nlohmann/json.hpp
//   ./train shipped rows.jsonl adapter_model.safetensors 200 8 3e-3 0
//
// The arguments: shipped folder, rows, adapter to write, steps, batch size, learning rate, weight decay.

#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <vector>

using nlohmann::json;
namespace fs = std::filesystem;

struct Tensor {
  std::vector<int64_t> shape;
  std::vector<float> values;
};

using Tensors = std::map<std::string, Tensor>;

struct Row {
  std::vector<int64_t> ids, labels;
};

struct Batch {
  std::vector<int64_t> shape;  // rows, positions
  std::vector<int64_t> ids, labels;
  Tensors floats;  // attn_bias, rope_cos, rope_sin
};

Tensor zeros(std::vector<int64_t> shape) {
  int64_t count = 1;
  for (int64_t size : shape) count *= size;
  return {std::move(shape), std::vector<float>(count)};
}

// --- What lies on the disk -------------------------------------------------------------------------------------------

std::vector<Row> read_rows(const fs::path& path) {
  std::vector<Row> rows;
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    json row = json::parse(line);
    rows.push_back({row["input_ids"], row["labels"]});
  }
  if (rows.empty()) throw std::runtime_error(path.string() + ": no rows");
  return rows;
}

// safetensors: the length of a JSON header (64 bits, little-endian), the header, the bytes.
Tensors read_adapter(const fs::path& path, const std::string& prefix) {
  std::ifstream file(path, std::ios::binary);
  uint64_t length = 0;
  file.read(reinterpret_cast<char*>(&length), sizeof length);
  if (!file || length > fs::file_size(path)) throw std::runtime_error(path.string() + ": not a safetensors file");
  std::string text(length, '\0');
  file.read(text.data(), static_cast<std::streamsize>(length));
  const json header = json::parse(text);
  Tensors tensors;
  for (const auto& [name, entry] : header.items()) {
    if (name == "__metadata__") continue;
    if (entry["dtype"] != "F32") throw std::runtime_error(name + " is not in float32");
    Tensor tensor = zeros(entry["shape"]);
    file.seekg(static_cast<std::streamoff>(sizeof length + length + entry["data_offsets"][0].get<uint64_t>()));
    file.read(reinterpret_cast<char*>(tensor.values.data()),
              static_cast<std::streamsize>(tensor.values.size() * sizeof(float)));
    if (!file) throw std::runtime_error(path.string() + ": cut off");
    tensors[name.substr(prefix.size())] = std::move(tensor);
  }
  return tensors;
}

void write_adapter(const fs::path& path, const std::string& prefix, const Tensors& parameters) {
  json header;
  uint64_t end = 0;
  for (const auto& [name, tensor] : parameters) {
    uint64_t start = end;
    end += tensor.values.size() * sizeof(float);
    header[prefix + name] = {{"dtype", "F32"}, {"shape", tensor.shape}, {"data_offsets", {start, end}}};
  }
  std::string text = header.dump();
  text.resize((text.size() + 7) / 8 * 8, ' ');
  uint64_t length = text.size();
  fs::path partial = path;
  partial += ".partial";
  std::ofstream file(partial, std::ios::binary);
  file.write(reinterpret_cast<const char*>(&length), sizeof length) << text;
  for (const auto& [name, tensor] : parameters)
    file.write(reinterpret_cast<const char*>(tensor.values.data()),
               static_cast<std::streamsize>(tensor.values.size() * sizeof(float)));
  file.close();
  if (!file) throw std::runtime_error(partial.string() + ": cannot be written");
  fs::rename(partial, path);  // an app that is killed leaves the old adapter or the new one
}

// --- Rows to tensors -------------------------------------------------------------------------------------------------

Batch make_batch(const std::vector<Row>& rows, const json& shipped) {
  const json& rope = shipped["architecture"]["rope"];
  const int64_t size = static_cast<int64_t>(rows.size()), dim = rope["dim"];
  int64_t longest = 0;
  for (const Row& row : rows) longest = std::max(longest, static_cast<int64_t>(row.ids.size()));
  const json& sliding = shipped["architecture"]["sliding_window"];
  const int64_t window = sliding.is_null() ? longest : sliding.get<int64_t>();

  Batch batch{{size, longest}, {}, {}, {}};
  batch.ids.assign(size * longest, shipped["tokenizer"]["pad_token_id"].get<int64_t>());
  batch.labels.assign(size * longest, -100);
  for (int64_t r = 0; r < size; ++r) {
    std::copy(rows[r].ids.begin(), rows[r].ids.end(), batch.ids.begin() + r * longest);
    // The label of a position is the token that shall follow it.
    std::copy(rows[r].labels.begin() + 1, rows[r].labels.end(), batch.labels.begin() + r * longest);
  }

  Tensor bias = zeros({size, 1, longest, longest});
  for (int64_t i = 0; i < size * longest * longest; ++i) {
    const int64_t query = i / longest % longest, key = i % longest;
    bias.values[i] = key <= query && key > query - window ? 0.0f : -1e4f;
  }

  // longrope has factors for short and for long batches; without it they are null.
  const bool is_long = longest > rope["original_max_position_embeddings"].get<int64_t>();
  const json& factors = rope[is_long ? "long_factor" : "short_factor"];
  const double theta = rope["theta"], scale = rope["attention_factor"];
  Tensor cosines = zeros({size, longest, dim}), sines = cosines;
  for (int64_t i = 0; i < size * longest * dim; ++i) {
    const int64_t position = i / dim % longest, pair = i % (dim / 2);
    const double factor = factors.is_null() ? 1.0 : factors[pair].get<double>();
    const double angle = static_cast<double>(position) / (factor * std::pow(theta, 2.0 * pair / dim));
    cosines.values[i] = static_cast<float>(std::cos(angle) * scale);
    sines.values[i] = static_cast<float>(std::sin(angle) * scale);
  }
  batch.floats = {{"attn_bias", bias}, {"rope_cos", cosines}, {"rope_sin", sines}};
  return batch;
}

// --- Running a graph -------------------------------------------------------------------------------------------------

template <typename T>
Ort::Value view(std::vector<T>& values, const std::vector<int64_t>& shape) {
  static const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  return Ort::Value::CreateTensor<T>(memory, values.data(), values.size(), shape.data(), shape.size());
}

// A graph whose inputs and outputs are the caller's own arrays: nothing is copied.
class Graph {
 public:
  Graph(Ort::Env& env, const fs::path& folder, const json& described)
      : described_(described), session_(env, (folder / described["file"].get<std::string>()).c_str(), {}) {}

  // `input` and `output` give the array for a tensor as target.json describes it.
  template <typename Input, typename Output>
  void run(Input input, Output output) {
    std::vector<Ort::Value> in, out;
    for (const json& tensor : described_["inputs"]) in.push_back(input(tensor));
    for (const json& tensor : described_["outputs"]) out.push_back(output(tensor));
    const auto in_names = pointers("inputs"), out_names = pointers("outputs");
    session_.Run(Ort::RunOptions{}, in_names.data(), in.data(), in.size(), out_names.data(), out.data(), out.size());
  }

 private:
  std::vector<const char*> pointers(const char* side) const {
    std::vector<const char*> found;
    for (const json& tensor : described_[side]) found.push_back(tensor["name"].get_ref<const std::string&>().c_str());
    return found;
  }

  const json& described_;
  Ort::Session session_;
};

const json& graph_of(const json& shipped, const std::string& role) {
  for (const json& graph : shipped["graphs"])
    if (graph["role"] == role) return graph;
  throw std::runtime_error("target.json has no graph " + role);
}

// --- The loop --------------------------------------------------------------------------------------------------------

int train(const fs::path& folder, const fs::path& rows_file, const fs::path& output, int steps, size_t batch_size,
          float learning_rate, float weight_decay) {
  const json shipped = json::parse(std::ifstream(folder / "target.json"));
  if (shipped["format"] != "edgetune-target" || shipped["format_version"] != 1)
    throw std::runtime_error("target.json is of another format");
  const std::vector<Row> rows = read_rows(rows_file);
  const std::string prefix = shipped["adapter"]["prefix"];
  Tensors parameters = read_adapter(folder / shipped["adapter"]["file"].get<std::string>(), prefix);

  Ort::Env env(ORT_LOGGING_LEVEL_WARNING, "edgetune");
  Graph step(env, folder, graph_of(shipped, "step")), adamw(env, folder, graph_of(shipped, "adamw"));

  // The state by graph input; the optimizer writes a second set, and the two change places after a good step.
  Tensors state = parameters, gradients;
  for (const auto& [name, value] : parameters) {
    state[name + ".exp_avg"] = state[name + ".exp_avg_sq"] = zeros(value.shape);
    gradients[name + ".grad"] = zeros(value.shape);
  }
  Tensors next = state;

  Tensors scalars;
  for (const auto& [name, value] : std::map<std::string, float>{
           {"loss_scale", 1}, {"learning_rate", learning_rate}, {"weight_decay", weight_decay}, {"step", 0},
           {"max_grad_norm", shipped["optimizer"]["max_grad_norm"]}, {"loss", 0}, {"grad_norm", 0}})
    scalars[name] = {{1}, {value}};
  auto array = [&](Tensors& from, const std::string& name) { return view(from.at(name).values, from.at(name).shape); };

  size_t first = 0;
  for (int number = 1; number <= steps; ++number) {
    const size_t last = std::min(first + batch_size, rows.size());
    Batch batch = make_batch({rows.begin() + first, rows.begin() + last}, shipped);
    first = last % rows.size();

    step.run(
        [&](const json& tensor) {
          const std::string name = tensor["name"], kind = tensor["kind"];
          if (kind == "input_ids") return view(batch.ids, batch.shape);
          if (kind == "labels") return view(batch.labels, batch.shape);
          if (kind == "parameter") return array(state, name);
          return kind == "loss_scale" ? array(scalars, name) : array(batch.floats, name);
        },
        [&](const json& tensor) {
          return tensor["kind"] == "loss" ? array(scalars, "loss") : array(gradients, tensor["name"]);
        });

    scalars["step"].values[0] = static_cast<float>(number);
    adamw.run(
        [&](const json& tensor) {
          const std::string name = tensor["name"];
          if (tensor["kind"] == "parameter.grad") return array(gradients, name);
          return tensor["parameter"].is_null() ? array(scalars, name) : array(state, name);
        },
        [&](const json& tensor) {
          const std::string name = tensor["name"];
          if (tensor["kind"] == "grad_norm") return array(scalars, name);
          return array(next, name.substr(0, name.size() - std::string(".next").size()));
        });

    const float loss = scalars["loss"].values[0], norm = scalars["grad_norm"].values[0];
    if (!std::isfinite(loss) || !std::isfinite(norm))
      throw std::runtime_error("loss or gradient is not finite; lower the learning rate");
    std::swap(state, next);
    std::printf("step %d loss %.6f gradient norm %.6f\n", number, loss, norm);
  }

  for (auto& [name, value] : parameters) value = state.at(name);
  write_adapter(output, prefix, parameters);
  return 0;
}

int main(int count, char** arguments) {
  if (count != 8) {
    std::fprintf(stderr, "usage: train FOLDER ROWS ADAPTER STEPS BATCH_SIZE LEARNING_RATE WEIGHT_DECAY\n");
    return 2;
  }
  try {
    return train(arguments[1], arguments[2], arguments[3], std::stoi(arguments[4]), std::stoul(arguments[5]),
                 std::stof(arguments[6]), std::stof(arguments[7]));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 1;
  }
}
