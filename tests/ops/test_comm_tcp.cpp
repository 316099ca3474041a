// Ranks over TCP on this machine: what they get, and how each kind of failure ends them.
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <catch2/catch_test_macros.hpp>
#include <catch2/matchers/catch_matchers_string.hpp>
#include <csignal>
#include <thread>

#include "engine/cli.h"
#include "engine/device/comm_tcp.h"
#include "engine/device/socket.h"
#include "engine/error.h"
#include "tests/ports.h"

using namespace kava;
using Catch::Matchers::ContainsSubstring;

namespace {

struct Start {
  int rank = 0, size = 2;
  TcpPlace place;
  CommOptions options = {};
};

std::vector<std::string> run(const std::vector<Start>& starts, const std::function<void(Comm&)>& body) {
  std::vector<std::string> failed(starts.size());
  std::vector<std::thread> threads;
  for (std::size_t i = 0; i < starts.size(); ++i)
    threads.emplace_back([&, i] {
      try {
        const Start& s = starts[i];
        const auto comm = make_tcp_comm(s.rank, s.size, s.place, s.options);
        body(*comm);
        comm->close();
      } catch (const Error& e) {
        failed[i] = fmt::format("{} {}", static_cast<int>(e.code()), e.what());
      }
    });
  for (std::thread& t : threads) t.join();
  return failed;
}

std::vector<Start> ranks(int n, const TcpPlace& place, double timeout = 60, double meeting = 20) {
  std::vector<Start> all;
  for (int r = 0; r < n; ++r) all.push_back({r, n, place, {timeout, 0, meeting}});
  return all;
}

}  // namespace

TEST_CASE("ranks over TCP find each other and gather, at the first port that is free") {
  const std::vector<int> ports = free_ports(4);
  std::string why;
  const Socket taken = listen_on("127.0.0.1", ports[0], why);  // never answers
  // Another start holds the second port.
  std::thread other([&] {
    run(ranks(2, {"127.0.0.1", {ports[1]}, "other"}), [](Comm& comm) {
      if (comm.leads()) std::this_thread::sleep_for(std::chrono::milliseconds(300));
      comm.barrier("waiting");
    });
  });
  for (int n : {2, 4}) {
    const auto failed = run(ranks(n, {"127.0.0.1", ports, "job"}), [&](Comm& comm) {
      for (int64_t bytes : {1, 1000, 3 << 20}) {
        std::string mine(static_cast<std::size_t>(bytes), static_cast<char>('a' + comm.rank())),
            all(mine.size() * static_cast<std::size_t>(n), '\0');
        comm.gather(all.data(), mine.data(), bytes, "gathering");
        for (int r = 0; r < n; ++r)
          if (all.substr(static_cast<std::size_t>(r * bytes), mine.size()) != std::string(mine.size(), static_cast<char>('a' + r)))
            throw Error(Exit::internal, "", "other bytes");
      }
      if (comm.broadcast(std::to_string(comm.rank()), "saying") != "0") throw Error(Exit::internal, "", "not rank 0's");
    });
    for (const std::string& f : failed) CHECK(f == "");
  }
  other.join();
}

TEST_CASE("a rank that never comes is named by all that did, with 6") {
  const TcpPlace place{"127.0.0.1", free_ports(1), "job"};
  std::vector<Start> starts = ranks(4, place, 60, 0.5);
  starts.erase(starts.begin() + 2);
  for (const std::string& f : run(starts, [](Comm&) {}))
    CHECK_THAT(f, ContainsSubstring("meeting the other ranks: rank 2 did not come within 0.5 s (--rendezvous-timeout)") &&
                      ContainsSubstring("6 rank"));
  const std::string f = run({{1, 2, place, {60, 0, 0.5}}}, [](Comm&) {})[0];
  CHECK_THAT(f, ContainsSubstring("6 rank 1 of 2: meeting the other ranks: rank 0 did not answer at port"));
}

TEST_CASE("a stop signal ends the waiting for a rank that does not come, with 75") {
  for (int rank : {0, 1}) {
    const TcpPlace place{"127.0.0.1", free_ports(1), "job"};
    const pid_t child = ::fork();
    if (child == 0) {
      ::alarm(30);
      catch_signals();
      ::raise(SIGTERM);
      const std::string failed = run({{rank, 2, place}}, [](Comm&) {})[0];
      ::_exit(failed.starts_with("75 ranks: stopped before all had met") ? 75 : 1);
    }
    int status = 0;
    REQUIRE(::waitpid(child, &status, 0) == child);
    CHECK((WIFEXITED(status) && WEXITSTATUS(status) == 75));
  }
}

TEST_CASE("ranks that count each other differently are refused by name on every rank, with 2") {
  const TcpPlace place{"127.0.0.1", free_ports(1), "job"};
  std::vector<Start> starts = ranks(3, place);
  starts[2].size = 4;
  std::string said;
  for (const std::string& f : run(starts, [](Comm&) {})) {
    CHECK_THAT(f, ContainsSubstring("2 ranks: "));
    said += f;
  }
  CHECK_THAT(said, ContainsSubstring("rank 2 counts 4 ranks, rank 0 counts 3"));
  starts = ranks(3, place);
  starts[2].rank = 1;
  for (const std::string& f : run(starts, [](Comm&) {})) CHECK_THAT(f, ContainsSubstring("2 ranks: two processes are rank 1"));
}

TEST_CASE("ranks meet beside connections that say nothing, and where rank 0 stands still for longer than a packet is late") {
  const TcpPlace place{"127.0.0.1", free_ports(1), "job"};
  for (const bool stands : {false, true}) {
    INFO(stands);
    // The queue of a listener takes connections of ranks before rank 0 has looked at them.
    const pid_t zero = ::fork();
    if (zero == 0) {
      ::alarm(30);
      ::_exit(run({{0, 3, place}}, [](Comm& comm) { comm.barrier("meeting"); })[0].empty() ? 0 : 1);
    }
    std::vector<Socket> silent;
    while (silent.empty())
      if (Socket s = connect_to("127.0.0.1", place.ports[0], after(5))) silent.push_back(std::move(s));
    silent.push_back(connect_to("127.0.0.1", place.ports[0], after(5)));
    if (stands) ::kill(zero, SIGSTOP);
    std::thread later([&] {
      if (stands) std::this_thread::sleep_for(std::chrono::milliseconds(2500)), ::kill(zero, SIGCONT);
    });
    for (const std::string& f : run({{1, 3, place}, {2, 3, place}}, [](Comm& comm) { comm.barrier("meeting"); })) CHECK(f == "");
    later.join();
    int status = 0;
    REQUIRE(::waitpid(zero, &status, 0) == zero);
    CHECK(status == 0);
  }
}

TEST_CASE("a rank that goes while others are still to come ends those that met, at once") {
  const TcpPlace place{"127.0.0.1", free_ports(1), "job"};
  const pid_t one = ::fork();
  if (one == 0) run({{1, 3, place}}, [](Comm&) {}), ::_exit(0);
  std::thread later([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(500));
    ::kill(one, SIGKILL);
  });
  const std::string f = run({{0, 3, place}}, [](Comm&) {})[0];
  CHECK_THAT(f, ContainsSubstring("6 rank 0 of 3: meeting the other ranks: rank 1 has gone"));
  later.join();
  ::waitpid(one, nullptr, 0);
}

TEST_CASE("a rank over TCP that fails, hangs or does something else is named by the others") {
  const TcpPlace place{"127.0.0.1", free_ports(1), "job"};
  auto failed = run(ranks(3, place), [](Comm& comm) {
    comm.barrier("first");
    if (comm.rank() == 1) throw Error(Exit::write, "disk", "is full");
    comm.barrier("second");
    comm.barrier("third");
  });
  CHECK(failed[1] == "7 disk: is full");
  for (int r : {0, 2})
    CHECK_THAT(failed[static_cast<std::size_t>(r)],
               ContainsSubstring(fmt::format("6 rank {} of 3: ", r)) && ContainsSubstring("rank 1 has gone"));
  std::atomic<int> over = 0;
  failed = run(ranks(3, place, 0.4), [&](Comm& comm) {
    comm.barrier("first");
    try {
      if (comm.rank() != 2) comm.barrier("second");
    } catch (...) {
      ++over;
      throw;
    }
    while (over < 2) std::this_thread::sleep_for(std::chrono::milliseconds(5));
    throw Error(Exit::internal, "", "hung");
  });
  for (int r : {0, 1})
    CHECK_THAT(failed[static_cast<std::size_t>(r)], ContainsSubstring("second: rank 2 did not come within 0.4 s (--comm-timeout)"));
  failed = run(ranks(2, place), [&](Comm& comm) {
    char all[16] = {}, mine[8] = {};
    comm.gather(all, mine, comm.leads() ? 8 : 4, "gathering");
  });
  for (const std::string& f : failed) CHECK_THAT(f, ContainsSubstring("rank 1 does another operation"));
}

TEST_CASE("what is no rank does not keep ranks from meeting, and bytes that change on their way are noticed") {
  const TcpPlace place{"127.0.0.1", free_ports(1), "job"};
  std::atomic<bool> done = false;
  std::thread stranger([&] {
    while (!done) {
      const Socket s = connect_to("127.0.0.1", place.ports[0], after(0.1));
      if (s) s.send("GET / HTTP/1.1\r\nHost: x\r\nUser-Agent: a long line\r\n\r\n", 52, after(1));
      std::this_thread::sleep_for(std::chrono::milliseconds(20));
    }
  });
  for (const std::string& f : run(ranks(3, place), [](Comm& comm) { comm.barrier("meeting"); })) CHECK(f == "");
  done = true;
  stranger.join();
  const std::string a(1000, 'x');
  for (std::size_t i : {std::size_t{0}, std::size_t{511}, std::size_t{999}}) {
    std::string b = a;
    b[i] ^= 4;
    CHECK(check_of(a.data(), a.size()) != check_of(b.data(), b.size()));
  }
  CHECK(check_of(a.data(), 999) != check_of(a.data(), 1000));
}
