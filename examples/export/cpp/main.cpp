// denoise PACKAGE INPUTS OUTPUT GUIDANCE
//
// Denoises with Euler steps of flow matching. INPUTS is a dict of tensors (torch.save): the noise
// under `hidden_states`, the texts under `cond` and `uncond`, the noise levels from 1 to 0 under
// `sigmas`. OUTPUT is the latent, as a tensor (torch.load).
#include "denoiser.h"

#include <fstream>
#include <iostream>
#include <iterator>

int main(int count, char** arguments) {
  if (count != 5) {
    std::cerr << "usage: denoise PACKAGE INPUTS OUTPUT GUIDANCE\n";
    return 2;
  }
  try {
    const c10::InferenceMode inference;
    Denoiser denoiser(arguments[1]);
    std::ifstream file(arguments[2], std::ios::binary);
    const std::vector<char> bytes((std::istreambuf_iterator<char>(file)), {});
    const auto given = torch::pickle_load(bytes).toGenericDict();
    auto latent = given.at("hidden_states").toTensor();
    const auto cond = given.at("cond").toTensor(), uncond = given.at("uncond").toTensor();
    const auto sigmas = given.at("sigmas").toTensor().to(torch::kFloat64);

    const double guidance = std::stod(arguments[4]);
    const int64_t steps = sigmas.size(0) - 1;
    denoiser.begin_request(steps);
    for (int64_t step = 0; step < steps; ++step) {
      const double sigma = sigmas[step].item<double>(), next = sigmas[step + 1].item<double>();
      const auto time = torch::full({latent.size(0)}, 1000.0 * sigma, torch::kFloat32);
      const auto call = [&](int64_t branch, const at::Tensor& text) {
        return denoiser(
            step, branch,
            {{"hidden_states", latent}, {"timestep", time}, {"encoder_hidden_states", text}});
      };
      const auto with = call(0, cond), without = call(1, uncond);
      latent = latent + (next - sigma) * (without + guidance * (with - without));
    }
    const auto saved = torch::pickle_save(latent);
    std::ofstream(arguments[3], std::ios::binary).write(saved.data(), saved.size());
  } catch (const std::exception& error) {
    std::cerr << "denoise: " << error.what() << "\n";
    return 1;
  }
  return 0;
}
