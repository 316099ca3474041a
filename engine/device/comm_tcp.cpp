// A collective is numbered and said in every frame, so that ranks that have lost each other notice. Rank 0 waits for the others one by one
// and meanwhile looks whether a later one has gone; it tells the others why it gives up before it does.
#include "engine/device/comm_tcp.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <optional>
#include <thread>

#include "engine/cli.h"
#include "engine/device/socket.h"
#include "engine/error.h"

namespace kava {

namespace {

constexpr double kGrace = 0.5;            // seconds that rank 0 is given to say why it gave up
constexpr double kToAnswer = 2;           // that a word of rank 0 is given to go out
constexpr double kConnect = 8;            // that a connection is waited for: three packets may be lost
constexpr double kConnectElse = 2;        // on the ports that rank 0 takes where its first is not free; a firewall may drop what they get
constexpr double kLook = 0.02;            // between looks at connections that have not said all yet
constexpr std::size_t kMostCallers = 64;  // those beyond the ranks; the first is forgotten where more say nothing
constexpr uint64_t kMostRefusal = 4096;   // of a frame that holds text

std::string numbers(const std::vector<int>& ranks) {
  return fmt::format("{}{}", ranks.size() > 1 ? "ranks " : "rank ", fmt::join(ranks, ", "));
}

FrameHead head_of(Frame kind, uint64_t number, const void* data, uint64_t bytes) {
  FrameHead head;
  head.kind = kind, head.number = number, head.bytes = bytes, head.check = check_of(data, bytes);
  return head;
}

Transfer send_frame(const Socket& to, const FrameHead& head, const void* data, Clock::time_point deadline,
                    const std::function<void()>& idle = {}) {
  const Transfer sent = to.send(&head, sizeof head, deadline, idle);
  return sent == Transfer::done ? to.send(data, head.bytes, deadline, idle) : sent;
}

// A frame that holds a text; nothing where it is none, or not there by then.
std::optional<std::pair<Frame, std::string>> receive_text(const Socket& from, Clock::time_point deadline,
                                                          const std::function<void()>& idle = {}) {
  FrameHead head;
  if (from.receive(&head, sizeof head, deadline, idle) != Transfer::done || head.magic != FrameHead::kMagic || head.bytes > kMostRefusal)
    return std::nullopt;
  std::string text(head.bytes, '\0');
  if (from.receive(text.data(), text.size(), deadline, idle) != Transfer::done || check_of(text.data(), text.size()) != head.check)
    return std::nullopt;
  return std::pair(head.kind, text);
}

// The text that has come whole meanwhile. A connection that says anything else, or that ended, is closed.
std::optional<std::pair<Frame, std::string>> heard(Socket& from) {
  FrameHead head;
  if (from.peek(&head.magic, sizeof head.magic) && head.magic != FrameHead::kMagic) from = Socket();
  else if (from.peek(&head, sizeof head)) {
    std::string all(sizeof head + std::min(head.bytes, kMostRefusal), '\0');
    if (head.bytes <= kMostRefusal && !from.peek(all.data(), all.size())) return std::nullopt;
    if (auto said = receive_text(from, Clock::now())) return said;
    from = Socket();
  } else if (from.hung_up()) {
    from = Socket();
  }
  return std::nullopt;
}

void send_text(const Socket& to, Frame kind, const std::string& text) {
  const std::string cut = text.substr(0, kMostRefusal);
  send_frame(to, head_of(kind, 0, cut.data(), cut.size()), cut.data(), after(kToAnswer));
}

class TcpComm final : public Comm {
 public:
  TcpComm(int rank, int size, const TcpPlace& place, const CommOptions& options)
      : Comm(rank, size, options.timeout), place_(place), meeting_(options.meeting) {
    watch_launcher(options.launcher);
    set_what("meeting the other ranks");
    peers_.resize(static_cast<std::size_t>(size));
    if (leads()) wait_for_all();
    else go_to_rank_0();
  }

 private:
  std::string hello() const { return fmt::format("kava ranks 1\n{}\n{}\n{}", place_.job, size(), rank()); }
  std::string ports() const {
    return place_.ports.size() == 1 ? std::to_string(place_.ports[0]) : fmt::format("{}..{}", place_.ports.front(), place_.ports.back());
  }

  // ---- the start
  // A signal ends the meeting, which may last long; the others notice that this rank has gone.
  void look_out() {
    look_around(0);
    if (stop_requested()) throw Error(Exit::stopped, "ranks", "stopped before all had met", "start all of them again");
  }

  void wait_for_all() {
    const Clock::time_point deadline = after(meeting_);
    Socket listener;
    std::string why;
    for (int port : place_.ports)
      if (!listener) listener = listen_on(place_.host, port, why);
    if (!listener) fail(fmt::format("cannot listen on port {} of {}: {}", ports(), escaped(place_.host), why));
    std::string wrong;
    std::vector<Socket> callers;  // that have not said yet who they are
    Clock::time_point until = deadline;
    for (int missing = size() - 1; missing > 0 && Clock::now() < until;) {
      Socket next = accept_from(listener, callers.empty() ? until : std::min(until, after(kLook)), [&] { look_out(); });
      if (next) callers.push_back(std::move(next));
      if (callers.size() > kMostCallers + peers_.size()) callers.erase(callers.begin());
      const bool sound = wrong.empty();
      for (Socket& caller : callers) missing -= take_in(caller, wrong);
      std::erase_if(callers, [](const Socket& caller) { return !caller; });
      // Those that are still on their way are to hear it too.
      if (sound && !wrong.empty()) until = std::min(deadline, after(kToAnswer));
      look_out();
    }
    if (!wrong.empty()) {
      tell_all(Frame::refusal, wrong);
      refuse(wrong);
    }
    std::vector<int> missing;
    for (int r = 1; r < size(); ++r)
      if (!peers_[static_cast<std::size_t>(r)]) missing.push_back(r);
    if (!missing.empty()) give_up(fmt::format("{} did not come within {:g} s (--rendezvous-timeout)", numbers(missing), meeting_));
    for (std::size_t r = 1; r < peers_.size(); ++r) send_text(peers_[r], Frame::go, "");
  }

  // Whether it is a rank of this start. `wrong`: what differs between ranks; who comes then is refused.
  bool take_in(Socket& caller, std::string& wrong) {
    const auto said = heard(caller);
    if (!said) return false;
    Socket next = std::move(caller);
    const std::string ours = fmt::format("kava ranks 1\n{}\n", place_.job);
    if (said->first != Frame::hello || !said->second.starts_with(ours)) return false;  // of another start, or no rank at all
    int ranks = 0, rank = -1;
    if (std::sscanf(said->second.c_str() + ours.size(), "%d\n%d", &ranks, &rank) != 2) return false;
    const bool known = 0 < rank && rank < size();
    if (!wrong.empty()) return send_text(next, Frame::refusal, wrong), true;
    if (ranks != size()) wrong = fmt::format("rank {} counts {} ranks, rank 0 counts {}", rank, ranks, size());
    else if (!known || peers_[static_cast<std::size_t>(rank)]) wrong = fmt::format("two processes are rank {}", rank);
    if (!wrong.empty()) return send_text(next, Frame::refusal, wrong), true;
    send_text(next, Frame::welcome, "");
    peers_[static_cast<std::size_t>(rank)] = std::move(next);
    return true;
  }

  [[noreturn]] static void refuse(const std::string& wrong) {
    throw Error(Exit::usage, "ranks", wrong, "start all ranks with the same --world-size, each with a --rank of its own");
  }

  // Where it has said hello it waits for as long as rank 0 may take: rank 0 may stand still, or packets be late.
  void go_to_rank_0() {
    const Clock::time_point deadline = after(meeting_);
    std::vector<Socket> asked(place_.ports.size());
    while (!peers_[0]) {
      for (std::size_t i = 0; i < asked.size() && !peers_[0]; ++i) {
        if (!asked[i]) asked[i] = say_hello(place_.ports[i], std::min(deadline, after(i == 0 ? kConnect : kConnectElse)));
        for (Socket& at : asked)
          if (at && !peers_[0]) be_answered(at);
      }
      if (peers_[0]) break;
      if (Clock::now() >= deadline)
        fail(fmt::format("rank 0 did not answer at port {} of {} within {:g} s (--rendezvous-timeout)", ports(), escaped(place_.host),
                         meeting_));
      look_out();
      std::this_thread::sleep_for(std::chrono::milliseconds(50));
    }
    // Rank 0 tells when its own time for this is over.
    const auto said = receive_text(peers_[0], after(meeting_ + kConnect), [&] { look_out(); });
    if (said) heed(said->first, said->second);
    if (said && said->first == Frame::go) return;
    fail(said || peers_[0].hung_up() ? "rank 0 has gone" : fmt::format("rank 0 did not come within {:g} s", meeting_ + kConnect));
  }

  // What rank 0 says before it leaves.
  void heed(Frame kind, const std::string& text) const {
    if (kind == Frame::refusal) refuse(escaped(text, kMostRefusal));
    if (kind == Frame::failure) fail(escaped(text, kMostRefusal));
  }
  void tell_all(Frame kind, const std::string& text) const {
    for (std::size_t r = 1; r < peers_.size(); ++r)
      if (peers_[r]) send_text(peers_[r], kind, text);
  }

  Socket say_hello(int port, Clock::time_point deadline) {
    Socket s = connect_to(place_.host, port, deadline, [&] { look_out(); });
    if (s) send_text(s, Frame::hello, hello());
    return s;
  }

  void be_answered(Socket& at) {
    const auto said = heard(at);
    if (!said) return;
    heed(said->first, said->second);
    if (said->first == Frame::welcome) peers_[0] = std::move(at);
  }

  // ---- collectives
  [[noreturn]] void give_up(const std::string& why) {
    if (leads()) tell_all(Frame::failure, why);
    fail(why);
  }

  [[noreturn]] void lost(Transfer how, int rank) {
    if (how == Transfer::late) give_up(fmt::format("rank {} did not come within {:g} s (--comm-timeout)", rank, timeout()));
    give_up(fmt::format("rank {} has gone", rank));
  }

  // No frame of rank 0 but its last word is taken here: the next collective's may be there already.
  void do_look() override {
    if (leads()) return look_around(0);
    FrameHead head;
    if (peers_[0].peek(&head, sizeof head) && head.magic == FrameHead::kMagic && head.kind == Frame::failure)
      receive_from(0, Frame::failure, nullptr, 0, after(kGrace));
    if (peers_[0].hung_up()) lost(Transfer::gone, 0);
  }

  // Called while rank `waiting_for` is waited for.
  void look_around(int waiting_for) {
    require_launcher();
    if (!leads()) return;
    for (int r = 1; r < size(); ++r)
      if (const Socket& peer = peers_[static_cast<std::size_t>(r)]; r != waiting_for && peer && peer.hung_up()) lost(Transfer::gone, r);
  }

  void send_to(int rank, Frame kind, const void* data, int64_t bytes, Clock::time_point deadline) {
    const Socket& to = peers_[static_cast<std::size_t>(rank)];
    const Transfer sent =
        send_frame(to, head_of(kind, number_, data, static_cast<uint64_t>(bytes)), data, deadline, [&] { look_around(rank); });
    // What rank 0 has said before it went can still be read.
    if (sent != Transfer::done && !leads()) receive_from(0, Frame::failure, nullptr, 0, after(kGrace));
    if (sent != Transfer::done) lost(sent, rank);
  }

  void receive_from(int rank, Frame kind, void* data, int64_t bytes, Clock::time_point deadline) {
    const Socket& from = peers_[static_cast<std::size_t>(rank)];
    auto idle = [&] { look_around(rank); };
    if (!leads()) deadline += std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(kGrace));
    FrameHead head;
    if (const Transfer got = from.receive(&head, sizeof head, deadline, idle); got != Transfer::done) lost(got, rank);
    if (head.magic == FrameHead::kMagic && head.kind == Frame::failure && head.bytes <= kMostRefusal) {
      std::string text(head.bytes, '\0');
      if (from.receive(text.data(), text.size(), after(kToAnswer)) == Transfer::done) heed(head.kind, text);
    }
    if (head.magic != FrameHead::kMagic || head.kind != kind || head.number != number_ || head.bytes != static_cast<uint64_t>(bytes))
      give_up(fmt::format("rank {} does another operation (its {}, this rank's {})", rank, head.number, number_));
    if (const Transfer got = from.receive(data, head.bytes, deadline, idle); got != Transfer::done) lost(got, rank);
    if (check_of(data, head.bytes) != head.check) give_up(fmt::format("bytes of rank {} were changed on their way", rank));
  }

  void do_gather(void* all, const void* mine, int64_t bytes) override {
    const Clock::time_point deadline = after(timeout());
    ++number_;
    if (!leads()) {
      send_to(0, Frame::gather, mine, bytes, deadline);
      return receive_from(0, Frame::gathered, all, bytes * size(), deadline);
    }
    char* to = static_cast<char*>(all);
    if (to != mine) std::memcpy(to, mine, static_cast<std::size_t>(bytes));
    for (int r = 1; r < size(); ++r) receive_from(r, Frame::gather, to + r * bytes, bytes, deadline);
    for (int r = 1; r < size(); ++r) send_to(r, Frame::gathered, all, bytes * size(), deadline);
  }

  void do_broadcast(void* data, int64_t bytes) override {
    const Clock::time_point deadline = after(timeout());
    ++number_;
    if (!leads()) return receive_from(0, Frame::broadcast, data, bytes, deadline);
    for (int r = 1; r < size(); ++r) send_to(r, Frame::broadcast, data, bytes, deadline);
  }

  const TcpPlace place_;
  const double meeting_;       // seconds
  std::vector<Socket> peers_;  // of rank 0: the others, by their number; of the others: rank 0
  uint64_t number_ = 0;
};

}  // namespace

std::unique_ptr<Comm> make_tcp_comm(int rank, int size, const TcpPlace& place, const CommOptions& options) {
  KAVA_CHECK(!place.ports.empty(), "no port to meet at");
  return std::make_unique<TcpComm>(rank, size, place, options);
}

}  // namespace kava
