// Races in a block's memory, found by vector clocks: an access has to know, through barriers, of those that it conflicts with.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace ptx {

// How far an agent has come, and how far it knows the others to have come. Agents are warps and, last, the accelerator that
// copies tensors and the tensor core. A second half tells the same of accesses that a fence between proxies has followed.
using Clock = std::vector<uint32_t>;

// Products and copies by descriptors access shared memory by a proxy of their own, which sees what warps stored if there was a
// fence.
enum class Proxy { kGeneric, kAsync };

// The time of an access that nothing has waited for yet, and of which nobody can know.
constexpr uint32_t kUnfinished = UINT32_MAX;

// Let a clock know what another one knows.
void join(Clock* clock, const Clock& other);

class Races {
 public:
  // `place` names what an address stands for.
  Races(int num_agents, size_t size, std::string (*place)(uint64_t address));

  // Take notice of an access at the present time of the agent. A race is a Fault. Writes of what is there already, as Triton's
  // warps do where they hold the same numbers, are none with other writes.
  void read(const Clock& clock, int agent, uint64_t address, int bytes, Proxy proxy = Proxy::kGeneric);
  void write(const Clock& clock, int agent, uint64_t address, int bytes, Proxy proxy = Proxy::kGeneric,
             bool is_there_already = false);

 private:
  void require_known_write(const Clock& clock, int agent, uint64_t address, Proxy proxy, const char* verb) const;
  [[noreturn]] void fail(int agent, const char* verb, uint64_t address, int other, const char* other_verb) const;
  std::string name(int agent) const;

  struct Write {
    uint32_t time = 0;  // 0: nobody wrote.
    int agent = 0;
    Proxy proxy = Proxy::kGeneric;
  };
  const int num_agents_;
  std::string (*const place_)(uint64_t);
  std::vector<Write> writes_;    // The last of each byte.
  std::vector<uint32_t> reads_;  // (bytes, agents): the time of each agent's last read.
};

}  // namespace ptx
