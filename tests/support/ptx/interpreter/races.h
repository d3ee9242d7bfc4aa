// Races in shared memory, found by vector clocks: an access has to know, through barriers, of those that it conflicts with.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace ptx {

// How far an agent has come, and how far it knows the others to have come. Agents are warps and, last, the accelerator that
// copies tensors.
using Clock = std::vector<uint32_t>;

// Let a clock know what another one knows.
void join(Clock* clock, const Clock& other);

class Races {
 public:
  Races(int num_agents, size_t shared_bytes);

  // Take notice of an access at the present time of the agent. A race is a Fault. Writes of what is there already, as Triton's
  // warps do where they hold the same numbers, are none with other writes.
  void read(const Clock& clock, int agent, uint64_t address, int bytes);
  void write(const Clock& clock, int agent, uint64_t address, int bytes, bool is_there_already = false);

 private:
  void require_known_write(const Clock& clock, int agent, uint64_t address, const char* verb) const;

  struct Write {
    uint32_t time = 0;  // 0: nobody wrote.
    int agent = 0;
  };
  const int num_agents_;
  std::vector<Write> writes_;    // The last of each byte.
  std::vector<uint32_t> reads_;  // (bytes, agents): the time of each agent's last read.
};

}  // namespace ptx
