// Runs a package of cachepass.export_aoti: keeps the state between the calls of a request.
#pragma once

#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

#include <cstdint>
#include <map>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

class Denoiser {
 public:
  explicit Denoiser(const std::string& path) : package_(path) {
    const auto metadata = package_.get_metadata();
    if (!metadata.count("cachepass.state")) {
      throw std::runtime_error(path + " was not made by cachepass.export_aoti");
    }
    std::istringstream inputs(metadata.at("cachepass.inputs"));
    for (std::string name; inputs >> name;) inputs_.push_back(name);
    std::istringstream lines(metadata.at("cachepass.state"));
    for (std::string line; std::getline(lines, line);) state_.push_back(parse(line));
  }

  // A request starts with nothing kept.
  void begin_request(int64_t num_steps) {
    num_steps_ = num_steps;
    kept_.clear();
  }

  // One call; `inputs` are the model's own, by name. Branches: 0 cond, 1 uncond, 2 any other.
  at::Tensor operator()(int64_t step, int64_t branch, std::map<std::string, at::Tensor> inputs) {
    inputs["step"] = torch::tensor(step, torch::kInt64);
    inputs["num_steps"] = torch::tensor(num_steps_, torch::kInt64);
    inputs["branch"] = torch::tensor(branch, torch::kInt64);
    std::vector<at::Tensor> given;
    for (const auto& name : inputs_) given.push_back(inputs.at(name));
    for (size_t i = 0; i < state_.size(); ++i) {
      auto [place, missing] = kept_.try_emplace(key(i, branch));
      if (missing) place->second = torch::zeros(state_[i].shape, state_[i].dtype);
      given.push_back(place->second);
    }
    auto made = package_.run(given);
    for (size_t i = 0; i < state_.size(); ++i) {
      if (state_[i].becomes >= 0) kept_[key(i, branch)] = made[state_[i].becomes];
    }
    return made[0];
  }

 private:
  struct State {
    bool shared;  // one for a request, instead of one for each of its branches
    torch::Dtype dtype;
    std::vector<int64_t> shape;
    int64_t becomes;  // place of the output that takes its place; -1 if it stays
  };

  static State parse(const std::string& line) {
    static const std::map<std::string, torch::Dtype> types = {
        {"float32", torch::kFloat32}, {"float64", torch::kFloat64}, {"float16", torch::kFloat16},
        {"bfloat16", torch::kBFloat16}, {"int64", torch::kInt64}, {"bool", torch::kBool}};
    std::istringstream words(line);
    std::string kind, dtype, shape;
    State state{};
    words >> kind >> dtype >> shape >> state.becomes;
    state.shared = kind == "request";
    state.dtype = types.at(dtype);
    std::istringstream sizes(shape);
    for (std::string size; std::getline(sizes, size, ',');) state.shape.push_back(std::stoll(size));
    return state;
  }

  std::pair<size_t, int64_t> key(size_t i, int64_t branch) const {
    return {i, state_[i].shared ? -1 : branch};
  }

  torch::inductor::AOTIModelPackageLoader package_;
  std::vector<std::string> inputs_;
  std::vector<State> state_;
  std::map<std::pair<size_t, int64_t>, at::Tensor> kept_;
  int64_t num_steps_ = -1;
};
