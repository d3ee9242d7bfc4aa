#include "races.h"

#include <algorithm>

#include "memory.h"

namespace ptx {

void join(Clock* clock, const Clock& other) {
  for (size_t agent = 0; agent < other.size(); ++agent) (*clock)[agent] = std::max((*clock)[agent], other[agent]);
}

Races::Races(int num_agents, size_t size, std::string (*place)(uint64_t address))
    : num_agents_(num_agents), place_(place), writes_(size), reads_(size * num_agents) {}

std::string Races::name(int agent) const {
  if (agent == num_agents_ - 1) return "the tensor core";
  return agent == num_agents_ - 2 ? "the accelerator" : "warp " + std::to_string(agent);
}

void Races::fail(int agent, const char* verb, uint64_t address, int other, const char* other_verb) const {
  throw Fault("race: " + name(agent) + " " + verb + " " + place_(address) + ", which " + name(other) + " " + other_verb +
              " with no barrier or wait between");
}

void Races::require_known_write(const Clock& clock, int agent, uint64_t address, Proxy proxy, const char* verb) const {
  const Write& last = writes_[address];
  if (last.agent != agent && last.time > clock[last.agent]) fail(agent, verb, address, last.agent, "wrote");
  if (proxy == Proxy::kAsync && last.proxy == Proxy::kGeneric && last.time > clock[num_agents_ + last.agent])
    throw Fault(name(agent) + " " + verb + " " + place_(address) + ", which " + name(last.agent) +
                " wrote with no fence between proxies");
}

void Races::read(const Clock& clock, int agent, uint64_t address, int bytes, Proxy proxy) {
  for (const uint64_t end = address + bytes; address < end; ++address) {
    require_known_write(clock, agent, address, proxy, "reads");
    reads_[address * num_agents_ + agent] = clock[agent];
  }
}

void Races::write(const Clock& clock, int agent, uint64_t address, int bytes, Proxy proxy, bool is_there_already) {
  for (const uint64_t end = address + bytes; address < end; ++address) {
    if (!is_there_already) require_known_write(clock, agent, address, proxy, "writes");
    const uint32_t* reads = &reads_[address * num_agents_];
    for (int other = 0; other < num_agents_; ++other)
      if (other != agent && reads[other] > clock[other]) fail(agent, "writes", address, other, "read");
    writes_[address] = {clock[agent], agent, proxy};
  }
}

}  // namespace ptx
