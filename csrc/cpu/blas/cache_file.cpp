#include "cache_file.h"

#include <array>
#include <cctype>
#include <cstdlib>
#include <fstream>
#include <sstream>

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include "../simd/instruction_sets.h"

namespace lcw_ops {
namespace {

const char* name_of(Multiplier multiplier) { return multiplier == Multiplier::own ? "own" : "torch"; }

std::string text(const char* variable) {
  const char* value = std::getenv(variable);
  return value ? value : "";
}

constexpr std::array pass_names{"forward",       "grad_input",       "grad_weight",
                                "plain_forward", "plain_grad_input", "plain_grad_weight"};

// The processor's name, as part of a file's name.
std::string processor() {
  std::string name = "cpu";
#if defined(__x86_64__)
  std::array<unsigned, 12> words{};
  for (unsigned i = 0; i < 3; ++i)
    __get_cpuid(0x80000002 + i, &words[4 * i], &words[4 * i + 1], &words[4 * i + 2], &words[4 * i + 3]);
  std::array<unsigned, 4> family{};
  __get_cpuid(1, &family[0], &family[1], &family[2], &family[3]);
  name.assign(reinterpret_cast<const char*>(words.data()), sizeof words);
  name = name.substr(0, name.find('\0')) + "-" + std::to_string(family[0]);
#endif
  name += instruction_set() == InstructionSet::avx512 ? "-avx512"
      : instruction_set() == InstructionSet::avx2     ? "-avx2"
                                                      : "-portable";
  std::replace_if(name.begin(), name.end(), [](unsigned char letter) { return !std::isalnum(letter); }, '-');
  return name;
}

// The file is in LCW_OPS_CACHE_DIR or, if that is not set, in lcw_ops/ in the user's cache folder. If it is set to an
// empty text, there is no file.
std::string answers_file() {
  std::string folder = text("LCW_OPS_CACHE_DIR");
  if (folder.empty()) {
    if (std::getenv("LCW_OPS_CACHE_DIR")) return "";
    std::string caches = text("XDG_CACHE_HOME");
    if (caches.empty()) {
      if (text("HOME").empty()) return "";
      caches = text("HOME") + "/.cache";
    }
    mkdir(caches.c_str(), 0700);
    folder = caches + "/lcw_ops";
  }
  mkdir(folder.c_str(), 0777);
  const uint64_t version = aoti_torch_abi_version();
  // Increase the number after "matmul" when the kernels change, because the old measurements then no longer hold.
  return folder + "/matmul-1-" + processor() + "-torch-" + std::to_string(version >> 56) + "." +
      std::to_string(version >> 48 & 255) + ".txt";
}

}  // namespace

std::optional<Multiplier> find_multiplier(const std::string& name) {
  for (const Multiplier multiplier : {Multiplier::own, Multiplier::torch})
    if (name == name_of(multiplier)) return multiplier;
  return std::nullopt;
}

void read_cache_file(std::map<Question, Multiplier>& answers) {
  std::ifstream in(answers_file());
  for (std::string line; std::getline(in, line);) {
    std::istringstream words(line);
    Question question;
    std::string pass, multiplier, rest;
    words >> pass >> question.type >> question.threads >> question.samples >> question.n >> question.m;
    if (!(words >> multiplier) || words >> rest) continue;
    question.pass = std::find(pass_names.begin(), pass_names.end(), pass) - pass_names.begin();
    if (const auto found = find_multiplier(multiplier)) answers.emplace(question, *found);
  }
}

void append_to_cache_file(const Question& question, Multiplier answer) {
  const std::string file = answers_file();
  const int out = file.empty() ? -1 : open(file.c_str(), O_RDWR | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
  if (out < 0) return;
  // The last line has no end if a process was ended while it wrote.
  const off_t end = lseek(out, 0, SEEK_END);
  char last = '\n';
  const bool is_torn = end > 0 && pread(out, &last, 1, end - 1) == 1 && last != '\n';
  std::ostringstream line;
  line << (is_torn ? "\n" : "") << pass_names[question.pass];
  for (const int64_t value : {question.type, question.threads, question.samples, question.n, question.m})
    line << ' ' << value;
  line << ' ' << name_of(answer) << '\n';
  // Write the line in one call, so that the lines of several processes do not mix.
  const std::string bytes = line.str();
  [[maybe_unused]] const ssize_t written = ::write(out, bytes.data(), bytes.size());
  close(out);
}

}  // namespace lcw_ops
