// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
//go:build ignore

// The kernel side of weir: it reports network namespaces to the agent (fork,
// exec), so that the agent listens there before a runtime starts; tracks
// container runtimes (exec, exit), redirects their connections to registries to
// the agent's listener in their own network namespace (connect4/6), and hands the
// original destination to the accepted socket (sockops). Of what connects to other
// ports, it reports what the client says first (egress), without touching it.
// Whatever goes wrong, the connection is left as it is.

#include <linux/bpf.h>
#include <linux/in.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>

char LICENSE[] SEC("license") = "Dual BSD/GPL";

#define AF_INET 2
#define AF_INET6 10
#define SOCK_STREAM 1
#define DNS 53
#define HTTPS 443
#define NAME_LEN 16 // TASK_COMM_LEN
#define MAX_SAID 4096 // of what a client says first
#define SAID_SIZE (1 << 18) // of the buffer for that
#define VISIT_INTERVAL (10ULL * 1000000) // ns, between looks at what isn't tracked
#define LOOK_AGAIN (3600ULL * 1000000000) // ns, after which a destination is looked at again
#define ETH_P_IP bpf_htons(0x0800)
#define ETH_P_IPV6 bpf_htons(0x86dd)
#define MAX_PROBES 4
#define MAX_LOOPBACK 8 // addresses of lo, of each family, that are looked at
#define IFF_UP 1
#define LOOPBACK4 bpf_htonl(0x7f000001)
#define MAPPED bpf_htonl(0xffff) // third word of ::ffff:a.b.c.d

// How a tracked process's connections are treated. Keep with Mode in Go.
enum mode {
	MODE_PROBE = 1, // only those to probe addresses are redirected; others are looked at
	MODE_NEW,	// as MODE_REDIRECT, and what goes direct is noted in weir_early
	MODE_REDIRECT,	// those to weir_ports are redirected, but for those to weir_left
	MODE_LENT,	// as MODE_REDIRECT, and as MODE_PROBE while one of weir_guests runs
};

// Values of weir_names. Keep with setUp in Go.
enum name_kind { NAME_RUNTIME = 1, NAME_GUEST };

// What the loader sets.
const volatile __u32 agent_pid;		   // thread-group id, in the first pid namespace
const volatile __u64 max_age;		   // of the heartbeat, ns
const volatile __u32 probes[MAX_PROBES];   // IPv4, network order; 0 ends the list

// The original destination of a redirected connection, and who made it.
struct origin {
	__u32 ip6[4]; // network order; IPv4 as ::ffff:a.b.c.d
	__u16 port;   // network order
	__u16 via;    // port of the listener that it was redirected to, network order
	__u32 tgid;
	__u32 mode;
	__u32 pad;
	__u64 netns;  // cookie
	__u64 cgroup; // id
};

// An end of a connection.
struct endpoint {
	__u64 netns; // cookie
	__u32 ip6[4];
	__u32 port; // host order
	__u32 pad;
};

// The agent's listeners in a network namespace; host order, 0 for none. Both
// are 0 from when the namespace was reported to the agent until it listens.
struct listener {
	__u16 port4;
	__u16 port6;
	__u32 suspended; // no more connections are redirected to it for now
};

// Reports a network namespace without a listener.
struct arrival {
	__u64 netns;  // cookie
	__u32 tgid;   // a process in it
	__u32 parent; // another one in it; 0 for none
};
const struct arrival *unused_arrival __attribute__((unused)); // has bpf2go make the type

// Reports what a client has said first to a destination that is not redirected.
struct said {
	__u64 netns; // cookie
	__u32 ip6[4];
	__u32 port; // host order
	__u32 tgid;
	__u32 length; // of data
	__u32 direct;	// the process is none that is redirected, at a port that is for others
	char comm[NAME_LEN];
	char data[MAX_SAID];
};
const struct said *unused_said __attribute__((unused)); // has bpf2go make the type

enum event_kind { EVENT_EXEC = 1, EVENT_EXIT, EVENT_GONE };

struct event {
	__u64 time; // since boot, ns
	__u32 kind;
	__u32 tgid;
	char name[NAME_LEN]; // which of names it was
	char comm[NAME_LEN];
};
const struct event *unused_event __attribute__((unused)); // has bpf2go make the type

// Keep with Stats in Go.
enum counter { REDIRECTED, NO_LISTENER, STALE_BEAT, UNFIT, EARLY, NO_ORIGIN, EVENTS_LOST, REFUSED, ARRIVALS_LOST, COUNTERS };

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} weir_heartbeat SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16384);
	__type(key, __u32); // tgid
	__type(value, __u32);
} weir_tracked SEC(".maps");

// Ports that are redirected, host order.
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1024);
	__type(key, __u16);
	__type(value, __u8);
} weir_ports SEC(".maps");

// Destinations that are left alone, until when (ns): not redirected if it is at one
// of weir_ports, not looked at elsewhere. 0 has it redirected, whatever its port.
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 16384);
	__type(key, struct endpoint);
	__type(value, __u64);
} weir_left SEC(".maps");

// On a client's socket whose first words are to be reported.
struct look {
	struct endpoint to;
	__u32 tgid;
	__u32 direct;
	char comm[NAME_LEN];
};
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct look);
} weir_looked SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, SAID_SIZE);
} weir_said SEC(".maps");

// What programs that are not tracked have connected to, until when (ns) that is not
// looked at again.
struct visit {
	char comm[NAME_LEN];
	__u32 ip6[4];
	__u32 port; // host order
};
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 4096);
	__type(key, struct visit);
	__type(value, __u64);
} weir_visits SEC(".maps");

// When the next of those is looked at, at the earliest (ns).
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} weir_visit_after SEC(".maps");

// Processes that connected directly while they were new: they may have read
// their root certificates before weir's was there.
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16384);
	__type(key, __u32); // tgid
	__type(value, __u8);
} weir_early SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 256);
	__type(key, char[NAME_LEN]);
	__type(value, __u8);
} weir_names SEC(".maps");

// Processes that have others pull for them: they count from their exec on, before
// those can have heard of them.
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16384);
	__type(key, __u32); // tgid
	__type(value, __u8);
} weir_guests SEC(".maps");

// How many of those run, and how many more that ran before their exec could be seen.
enum guest_count { GUESTS, SEEDED_GUESTS, GUEST_COUNTS };
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, GUEST_COUNTS);
	__type(key, __u32);
	__type(value, __u32);
} weir_guest_counts SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16384);
	__type(key, __u64); // network namespace cookie
	__type(value, struct listener);
} weir_listeners SEC(".maps");

// Processes whose end is reported to the agent.
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16384);
	__type(key, __u32); // tgid
	__type(value, __u8);
} weir_watched SEC(".maps");

// On the agent's listeners: no other process can put it there, so one that
// happens to listen on a listener's port is not taken for it.
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, __u8);
} weir_marks SEC(".maps");

// The origin is on the client's socket from connect() on, is handed over by
// endpoint when the SYN leaves, and is on the agent's socket before accept()
// can return it.
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct origin);
} weir_dialled SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 65536);
	__type(key, struct endpoint);
	__type(value, struct origin);
} weir_handover SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct origin);
} weir_accepted SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_CGROUP_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
} weir_subtree SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 18);
} weir_events SEC(".maps");

// Apart from the events, so that a storm of namespaces can't push those out.
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 16);
} weir_arrivals SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, COUNTERS);
	__type(key, __u32);
	__type(value, __u64);
} weir_counters SEC(".maps");

static __always_inline void count(__u32 which)
{
	__u64 *n = bpf_map_lookup_elem(&weir_counters, &which);

	if (n)
		*n += 1;
}

// What is read of the kernel's own structures, wherever they are in this kernel.
#define CORE __attribute__((preserve_access_index))
typedef struct {
	int counter;
} atomic_t;
struct qstr {
	const unsigned char *name;
} CORE;
struct dentry {
	struct qstr d_name;
} CORE;
struct path {
	struct dentry *dentry;
} CORE;
struct file {
	struct path f_path;
} CORE;
struct linux_binprm {
	struct file *file;
} CORE;
struct signal_struct {
	atomic_t live;
} CORE;
struct list_head {
	struct list_head *next;
} CORE;
struct ip6 {
	__u32 word[4];
};
struct inet6_ifaddr {
	struct ip6 addr;
	struct list_head if_list;
} CORE;
struct inet6_dev {
	struct list_head addr_list;
} CORE;
struct in_ifaddr {
	struct in_ifaddr *ifa_next;
	__u32 ifa_local;
	__u32 ifa_mask;
} CORE;
struct in_device {
	struct in_ifaddr *ifa_list;
} CORE;
struct net_device {
	unsigned int flags;
	struct in_device *ip_ptr;
	struct inet6_dev *ip6_ptr;
} CORE;
struct net {
	__u64 net_cookie;
	struct net_device *loopback_dev;
} CORE;
typedef struct {
	struct net *net;
} possible_net_t;
struct sock_common {
	possible_net_t skc_net;
} CORE;
struct sock {
	struct sock_common __sk_common;
	__u32 sk_ack_backlog;
	__u32 sk_max_ack_backlog;
} CORE;
struct nsproxy {
	struct net *net_ns;
} CORE;
struct task_struct {
	int pid;
	int tgid;
	struct signal_struct *signal;
	struct nsproxy *nsproxy;
} CORE;

// ---- connections ----

static __always_inline int is_alive(void)
{
	__u32 zero = 0;
	__u64 *beat = bpf_map_lookup_elem(&weir_heartbeat, &zero);

	return beat && bpf_ktime_get_ns() - *beat <= max_age;
}

static __always_inline int is_wanted_port(__u16 port)
{
	return bpf_map_lookup_elem(&weir_ports, &port) != 0;
}

static __always_inline int is_left(struct endpoint *to)
{
	__u64 *until = bpf_map_lookup_elem(&weir_left, to);

	return until && *until > bpf_ktime_get_ns();
}

static __always_inline int is_wanted(struct endpoint *to)
{
	__u64 *until = bpf_map_lookup_elem(&weir_left, to);

	return until && !*until;
}

// look has what a client says first to a destination reported, if that isn't known
// already.
static __always_inline void look(struct bpf_sock *sk, struct endpoint *to, __u32 tgid)
{
	struct listener *l = bpf_map_lookup_elem(&weir_listeners, &to->netns);
	struct look *on;

	if (!l || !(l->port4 || l->port6) || !is_alive() || is_left(to))
		return;
	on = bpf_sk_storage_get(&weir_looked, sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (!on)
		return;
	on->to = *to;
	on->direct = 0;
	on->tgid = tgid;
}

static __always_inline __u32 *guest_count(__u32 which)
{
	return bpf_map_lookup_elem(&weir_guest_counts, &which);
}

static __always_inline int has_guests(void)
{
	__u32 *seen = guest_count(GUESTS), *seeded = guest_count(SEEDED_GUESTS);

	return !seen || !seeded || *seen || *seeded;
}

static __always_inline int is_probe(__u32 ip4)
{
#pragma unroll
	for (int i = 0; i < MAX_PROBES; i++) {
		if (!probes[i])
			return 0;
		if (probes[i] == ip4)
			return 1;
	}
	return 0;
}

// loopback_up says whether 127.0.0.1 or ::1 is there in a socket's network
// namespace: where it isn't, there may be a listener, but no connection to it can
// be made.
static __always_inline int loopback_up(struct bpf_sock *sk, int v6)
{
	struct sock *s = (struct sock *)bpf_skc_to_tcp_sock(sk);
	struct list_head *head, *at;
	struct in_ifaddr *ifa4;
	struct net_device *lo;
	struct ip6 ip;

	if (!s)
		return 0;
	lo = s->__sk_common.skc_net.net->loopback_dev;
	if (!(lo->flags & IFF_UP))
		return 0;
	if (!v6) {
		// With an address of a network in lo, all of that network is local.
		ifa4 = BPF_CORE_READ(lo, ip_ptr, ifa_list);
#pragma unroll
		for (int i = 0; i < MAX_LOOPBACK; i++) {
			if (!ifa4)
				return 0;
			if (!((BPF_CORE_READ(ifa4, ifa_local) ^ LOOPBACK4) & BPF_CORE_READ(ifa4, ifa_mask)))
				return 1;
			ifa4 = BPF_CORE_READ(ifa4, ifa_next);
		}
		return 0;
	}
	if (!bpf_core_field_exists(struct inet6_ifaddr, if_list))
		return 0;
	head = __builtin_preserve_access_index(&lo->ip6_ptr->addr_list);
	at = BPF_CORE_READ(lo, ip6_ptr, addr_list.next);
#pragma unroll
	for (int i = 0; i < MAX_LOOPBACK; i++) {
		void *ifa = (void *)at - bpf_core_field_offset(struct inet6_ifaddr, if_list);

		if (!at || at == head)
			return 0;
		if (bpf_probe_read_kernel(&ip, sizeof(ip), ifa + bpf_core_field_offset(struct inet6_ifaddr, addr)))
			return 0;
		if (!ip.word[0] && !ip.word[1] && !ip.word[2] && ip.word[3] == bpf_htonl(1))
			return 1;
		at = BPF_CORE_READ(at, next);
	}
	return 0;
}

static __always_inline int is_ready(struct bpf_sock *sk)
{
	int ok = sk->state == BPF_TCP_LISTEN && bpf_sk_storage_get(&weir_marks, sk, 0, 0);
	struct sock *s = (struct sock *)bpf_skc_to_tcp_sock(sk);

	// When it is full, connections to it would wait for a second and more.
	if (s && s->sk_ack_backlog > s->sk_max_ack_backlog / 2)
		ok = 0;
	bpf_sk_release(sk);
	return ok;
}

// is_open says whether the agent is listening on 127.0.0.1 or ::1.
static __always_inline int is_open(struct bpf_sock_addr *ctx, int v6, __u16 port)
{
	struct bpf_sock_tuple t = {};
	struct bpf_sock *sk;

	if (!port)
		return 0;
	if (v6) {
		t.ipv6.saddr[3] = t.ipv6.daddr[3] = bpf_htonl(1);
		t.ipv6.sport = bpf_htons(1); // any
		t.ipv6.dport = bpf_htons(port);
		sk = bpf_sk_lookup_tcp(ctx, &t, sizeof(t.ipv6), BPF_F_CURRENT_NETNS, 0);
	} else {
		t.ipv4.saddr = t.ipv4.daddr = LOOPBACK4;
		t.ipv4.sport = bpf_htons(1);
		t.ipv4.dport = bpf_htons(port);
		sk = bpf_sk_lookup_tcp(ctx, &t, sizeof(t.ipv4), BPF_F_CURRENT_NETNS, 0);
	}
	return sk ? is_ready(sk) : 0;
}

// visit has what a process that is not redirected says first to a port of registries
// reported, once in a while for each of its destinations. It is a look, and no more:
// the connection is as it would be without.
static __always_inline void visit(struct bpf_sock_addr *ctx, __u32 tgid, __u32 a, __u32 b, __u32 c, __u32 d)
{
	__u16 dport = bpf_ntohs((__u16)ctx->user_port);
	__u64 now = bpf_ktime_get_ns(), *until, *after;
	struct bpf_sock *sk = ctx->sk;
	struct visit v = {};
	struct look *on;
	__u32 zero = 0;

	if (!sk || ctx->protocol != IPPROTO_TCP || tgid == agent_pid || !is_wanted_port(dport) || !is_alive())
		return;
	after = bpf_map_lookup_elem(&weir_visit_after, &zero);
	if (!after || *after > now)
		return;
	bpf_get_current_comm(v.comm, sizeof(v.comm));
	v.ip6[0] = a;
	v.ip6[1] = b;
	v.ip6[2] = c;
	v.ip6[3] = d;
	v.port = dport;
	until = bpf_map_lookup_elem(&weir_visits, &v);
	if (until && *until > now)
		return;
	on = bpf_sk_storage_get(&weir_looked, sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (!on)
		return;
	*after = now + VISIT_INTERVAL;
	now += LOOK_AGAIN;
	bpf_map_update_elem(&weir_visits, &v, &now, BPF_ANY);
	on->to.netns = bpf_get_netns_cookie(ctx);
	on->to.ip6[0] = a;
	on->to.ip6[1] = b;
	on->to.ip6[2] = c;
	on->to.ip6[3] = d;
	on->to.port = dport;
	on->tgid = tgid;
	on->direct = 1;
	__builtin_memcpy(on->comm, v.comm, sizeof(on->comm));
}

// redirect decides whether a connection is redirected. If so it stores the origin
// and returns the listener's port, in network order; else 0.
static __always_inline __u16 redirect(struct bpf_sock_addr *ctx, __u32 tgid, __u32 mode, int v6, __u32 a, __u32 b, __u32 c, __u32 d)
{
	__u16 dport = bpf_ntohs((__u16)ctx->user_port), port;
	struct endpoint to = {};
	struct bpf_sock *sk = ctx->sk;
	struct origin *o;
	struct listener *l;
	__u64 netns;

	// A socket may be used again after a failed connect() or AF_UNSPEC.
	if (sk) {
		bpf_sk_storage_delete(&weir_dialled, sk);
		bpf_sk_storage_delete(&weir_looked, sk);
	}
	if (mode == MODE_LENT)
		mode = has_guests() ? MODE_PROBE : MODE_REDIRECT;
	netns = bpf_get_netns_cookie(ctx);
	if (!(dport == HTTPS && !v6 && is_probe(d))) {
		// It is seen, and not left alone for that: the process may be redirected later.
		if (mode == MODE_PROBE && is_wanted_port(dport)) {
			visit(ctx, tgid, a, b, c, d);
			return 0;
		}
		to.netns = netns;
		to.ip6[0] = a;
		to.ip6[1] = b;
		to.ip6[2] = c;
		to.ip6[3] = d;
		to.port = dport;
		if (mode == MODE_PROBE || (!is_wanted_port(dport) && !is_wanted(&to))) {
			if (sk && ctx->protocol == IPPROTO_TCP && dport != DNS)
				look(sk, &to, tgid);
			return 0;
		}
		// What is new is not to connect anywhere before it is known how to treat it.
		if (mode == MODE_REDIRECT && is_left(&to))
			return 0;
	}
	if (!sk || ctx->protocol != IPPROTO_TCP || sk->bound_dev_if) { // loopback is another device
		count(UNFIT);
		return 0;
	}
	if (!is_alive()) {
		count(STALE_BEAT);
		return 0;
	}
	l = bpf_map_lookup_elem(&weir_listeners, &netns);
	if (!l) {
		count(NO_LISTENER);
		return 0;
	}
	port = v6 ? l->port6 : l->port4;
	if (l->suspended || !loopback_up(sk, v6) || !is_open(ctx, v6, port)) {
		count(NO_LISTENER);
		return 0;
	}
	o = bpf_sk_storage_get(&weir_dialled, sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (!o) {
		count(UNFIT);
		return 0;
	}
	o->ip6[0] = a;
	o->ip6[1] = b;
	o->ip6[2] = c;
	o->ip6[3] = d;
	o->port = ctx->user_port;
	o->via = bpf_htons(port);
	o->tgid = tgid;
	o->mode = mode;
	o->netns = netns;
	o->cgroup = bpf_get_current_cgroup_id();
	count(REDIRECTED);
	return o->via;
}

// note_direct notes that a new process has connected without being redirected.
static __always_inline void note_direct(__u32 tgid, __u32 mode, __u32 user_port)
{
	__u8 one = 1;

	if (mode != MODE_NEW || user_port == bpf_htons(DNS))
		return;
	bpf_map_update_elem(&weir_early, &tgid, &one, BPF_ANY);
	count(EARLY);
}

// allow_connect says whether a process may connect to a port of its loopback
// interface. A listener's port serves only connections that were redirected to
// it, so others are refused.
static __always_inline int allow_connect(struct bpf_sock_addr *ctx, int v6)
{
	__u64 netns = bpf_get_netns_cookie(ctx);
	struct listener *l = bpf_map_lookup_elem(&weir_listeners, &netns);
	__u16 port = bpf_ntohs((__u16)ctx->user_port);

	if (!l || !port || port != (v6 ? l->port6 : l->port4))
		return 1;
	count(REFUSED);
	return 0;
}

static __always_inline int is_loopback4(__u32 ip)
{
	return !ip || (ip & bpf_htonl(0xff000000)) == bpf_htonl(0x7f000000);
}

SEC("cgroup/connect4")
int weir_connect4(struct bpf_sock_addr *ctx)
{
	__u32 tgid, *mode, ip;
	__u16 via;

	if (ctx->type != SOCK_STREAM)
		return 1;
	ip = ctx->user_ip4;
	if (ip == LOOPBACK4 || !ip)
		return allow_connect(ctx, 0);
	if (is_loopback4(ip))
		return 1;
	tgid = bpf_get_current_pid_tgid() >> 32;
	mode = bpf_map_lookup_elem(&weir_tracked, &tgid);
	if (!mode) {
		visit(ctx, tgid, 0, 0, MAPPED, ip);
		return 1;
	}
	via = redirect(ctx, tgid, *mode, 0, 0, 0, MAPPED, ip);
	if (via) {
		ctx->user_ip4 = LOOPBACK4;
		ctx->user_port = via;
	} else {
		note_direct(tgid, *mode, ctx->user_port);
	}
	return 1;
}

SEC("cgroup/connect6")
int weir_connect6(struct bpf_sock_addr *ctx)
{
	__u32 tgid, *mode, a, b, c, d;
	int mapped;
	__u16 via;

	if (ctx->type != SOCK_STREAM)
		return 1;
	a = ctx->user_ip6[0];
	b = ctx->user_ip6[1];
	c = ctx->user_ip6[2];
	d = ctx->user_ip6[3];
	mapped = !a && !b && c == MAPPED;
	if (mapped && (d == LOOPBACK4 || !d))
		return allow_connect(ctx, 0);
	if (!a && !b && !c && (!d || d == bpf_htonl(1)))
		return allow_connect(ctx, 1);
	if (mapped && is_loopback4(d))
		return 1;
	tgid = bpf_get_current_pid_tgid() >> 32;
	mode = bpf_map_lookup_elem(&weir_tracked, &tgid);
	if (!mode) {
		visit(ctx, tgid, a, b, c, d);
		return 1;
	}
	// A mapped address stays one: the socket may be IPv6-only otherwise.
	via = mapped ? redirect(ctx, tgid, *mode, 0, a, b, c, d) : redirect(ctx, tgid, *mode, 1, a, b, c, d);
	if (!via) {
		note_direct(tgid, *mode, ctx->user_port);
		return 1;
	}
	if (mapped) {
		ctx->user_ip6[3] = LOOPBACK4;
	} else {
		ctx->user_ip6[0] = 0;
		ctx->user_ip6[1] = 0;
		ctx->user_ip6[2] = 0;
		ctx->user_ip6[3] = bpf_htonl(1);
	}
	ctx->user_port = via;
	return 1;
}

// clang would otherwise select among addresses of ctx's fields, which the
// verifier refuses: both families are read first, and values selected.
#define READ(x) (*(volatile __u32 *)&(x))

static __always_inline void endpoint_of(struct endpoint *e, __u32 family, __u32 v4, __u32 a, __u32 b, __u32 c, __u32 d)
{
	int v6 = family == AF_INET6;

	e->ip6[0] = v6 ? a : 0;
	e->ip6[1] = v6 ? b : 0;
	e->ip6[2] = v6 ? c : MAPPED;
	e->ip6[3] = v6 ? d : v4;
}

// on_active hands the origin over when the client's SYN is about to leave.
static __noinline int on_active(struct bpf_sock_ops *s)
{
	__u32 v4 = READ(s->local_ip4), a = READ(s->local_ip6[0]), b = READ(s->local_ip6[1]), c = READ(s->local_ip6[2]), d = READ(s->local_ip6[3]);
	struct bpf_sock *sk = s->sk;
	struct endpoint e = {};
	struct origin *o;

	if (!sk)
		return 1;
	o = bpf_sk_storage_get(&weir_dialled, sk, 0, 0);
	if (!o)
		return 1;
	if (bpf_ntohl(s->remote_port) != bpf_ntohs(o->via)) {
		bpf_sk_storage_delete(&weir_dialled, sk);
		return 1;
	}
	endpoint_of(&e, s->family, v4, a, b, c, d);
	e.netns = bpf_get_netns_cookie(s);
	e.port = s->local_port;
	bpf_map_update_elem(&weir_handover, &e, o, BPF_ANY);
	return 1;
}

// on_passive puts the origin on the socket that the listener is about to accept.
static __noinline int on_passive(struct bpf_sock_ops *s)
{
	__u32 v4 = READ(s->remote_ip4), a = READ(s->remote_ip6[0]), b = READ(s->remote_ip6[1]), c = READ(s->remote_ip6[2]), d = READ(s->remote_ip6[3]);
	struct bpf_sock *sk = s->sk;
	struct endpoint e = {};
	struct origin *o;
	struct listener *l;

	if (!sk)
		return 1;
	e.netns = bpf_get_netns_cookie(s);
	l = bpf_map_lookup_elem(&weir_listeners, &e.netns);
	if (!l || (s->local_port != l->port4 && s->local_port != l->port6))
		return 1;
	endpoint_of(&e, s->family, v4, a, b, c, d);
	e.port = bpf_ntohl(s->remote_port);
	o = bpf_map_lookup_elem(&weir_handover, &e);
	if (!o || bpf_ntohs(o->via) != s->local_port) {
		count(NO_ORIGIN);
		return 1;
	}
	bpf_sk_storage_get(&weir_accepted, sk, o, BPF_SK_STORAGE_GET_F_CREATE);
	bpf_map_delete_elem(&weir_handover, &e);
	return 1;
}

SEC("sockops")
int weir_sockops(struct bpf_sock_ops *s)
{
	switch (s->op) {
	case BPF_SOCK_OPS_TCP_CONNECT_CB: // the source port is chosen, the SYN has not left
		return on_active(s);
	case BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB: // the listener is not woken yet
		return on_passive(s);
	}
	return 1;
}

// The packet leaves as it is, whatever happens here.
SEC("cgroup_skb/egress")
int weir_egress(struct __sk_buff *skb)
{
	struct bpf_sock *sk = skb->sk;
	__u32 at, length;
	__u64 until;
	struct look *on;
	struct said *s;
	__u8 b;

	if (!sk)
		return 1;
	sk = bpf_sk_fullsock(sk);
	if (!sk)
		return 1;
	on = bpf_sk_storage_get(&weir_looked, sk, 0, 0);
	if (!on)
		return 1;
	if (skb->protocol == ETH_P_IP) {
		if (bpf_skb_load_bytes(skb, 0, &b, 1))
			return 1;
		at = (b & 15) * 4;
	} else if (skb->protocol == ETH_P_IPV6) {
		at = 40;
	} else {
		return 1;
	}
	if (bpf_skb_load_bytes(skb, at + 12, &b, 1)) // the TCP header's length
		return 1;
	at += (b >> 4) * 4;
	length = skb->len;
	if (length <= at)
		return 1; // it opens or acknowledges
	length -= at;
	if (on->direct && bpf_ringbuf_query(&weir_said, BPF_RB_AVAIL_DATA) > SAID_SIZE / 4)
		goto done; // it is for what is tracked
	s = bpf_ringbuf_reserve(&weir_said, sizeof(*s), 0);
	if (!s)
		goto done;
	if (length > MAX_SAID)
		length = MAX_SAID;
	// The verifier is to see that it is neither 0 nor more.
	length--;
	asm volatile("" : "+r"(length));
	length = (length & (MAX_SAID - 1)) + 1;
	s->netns = on->to.netns;
	s->ip6[0] = on->to.ip6[0];
	s->ip6[1] = on->to.ip6[1];
	s->ip6[2] = on->to.ip6[2];
	s->ip6[3] = on->to.ip6[3];
	s->port = on->to.port;
	s->tgid = on->tgid;
	s->length = length;
	s->direct = on->direct;
	__builtin_memcpy(s->comm, on->comm, sizeof(s->comm));
	if (bpf_skb_load_bytes(skb, at, s->data, length)) {
		bpf_ringbuf_discard(s, 0);
		goto done;
	}
	bpf_ringbuf_submit(s, 0);
	if (!on->direct) {
		until = bpf_ktime_get_ns() + LOOK_AGAIN;
		bpf_map_update_elem(&weir_left, &on->to, &until, BPF_ANY);
	}
done:
	bpf_sk_storage_delete(&weir_looked, sk);
	return 1;
}

static __always_inline struct origin *peer_of(struct bpf_sock_addr *ctx)
{
	struct origin *o = 0;

	if (ctx->sk)
		o = bpf_sk_storage_get(&weir_dialled, ctx->sk, 0, 0);
	// Not if the socket was connected elsewhere since.
	return o && o->via == (__u16)ctx->user_port ? o : 0;
}

SEC("cgroup/getpeername4")
int weir_getpeername4(struct bpf_sock_addr *ctx)
{
	struct origin *o = peer_of(ctx);

	if (o && ctx->user_ip4 == LOOPBACK4) {
		ctx->user_ip4 = o->ip6[3];
		ctx->user_port = o->port;
	}
	return 1;
}

SEC("cgroup/getpeername6")
int weir_getpeername6(struct bpf_sock_addr *ctx)
{
	struct origin *o = peer_of(ctx);

	if (o && (ctx->user_ip6[3] == LOOPBACK4 || ctx->user_ip6[3] == bpf_htonl(1))) {
		ctx->user_ip6[0] = o->ip6[0];
		ctx->user_ip6[1] = o->ip6[1];
		ctx->user_ip6[2] = o->ip6[2];
		ctx->user_ip6[3] = o->ip6[3];
		ctx->user_port = o->port;
	}
	return 1;
}

// ---- processes ----

static __always_inline void report(__u32 kind, __u32 tgid, const char *name)
{
	struct event *e = bpf_ringbuf_reserve(&weir_events, sizeof(*e), 0);

	if (!e) {
		count(EVENTS_LOST);
		return;
	}
	e->time = bpf_ktime_get_boot_ns();
	e->kind = kind;
	e->tgid = tgid;
	__builtin_memcpy(e->name, name, NAME_LEN);
	bpf_get_current_comm(e->comm, sizeof(e->comm));
	bpf_ringbuf_submit(e, 0);
}

static __always_inline void add_guest(__u32 tgid)
{
	__u32 *n = guest_count(GUESTS);
	__u8 one = 1;

	if (n && !bpf_map_update_elem(&weir_guests, &tgid, &one, BPF_NOEXIST))
		__sync_fetch_and_add(n, 1);
}

static __always_inline void remove_guest(__u32 tgid)
{
	__u32 *n = guest_count(GUESTS);

	if (n && !bpf_map_delete_elem(&weir_guests, &tgid))
		__sync_fetch_and_add(n, -1);
}

static __always_inline void forget(__u32 tgid)
{
	char none[NAME_LEN] = {};

	remove_guest(tgid);
	if (bpf_map_delete_elem(&weir_tracked, &tgid))
		return; // it wasn't there
	bpf_map_delete_elem(&weir_early, &tgid);
	report(EVENT_EXIT, tgid, none);
}

// announce reports a process's network namespace to the agent, unless it has been
// reported. parent is another process there, or 0.
static __always_inline void announce(struct task_struct *task, __u32 parent)
{
	__u64 netns = task->nsproxy->net_ns->net_cookie;
	struct listener none = {};
	struct arrival *a;

	if (!netns || bpf_map_lookup_elem(&weir_listeners, &netns) || bpf_current_task_under_cgroup(&weir_subtree, 0) != 1)
		return;
	if (bpf_map_update_elem(&weir_listeners, &netns, &none, BPF_NOEXIST))
		return; // another was faster, or the map is full
	a = bpf_ringbuf_reserve(&weir_arrivals, sizeof(*a), 0);
	if (!a) {
		bpf_map_delete_elem(&weir_listeners, &netns); // the next process is reported instead
		count(ARRIVALS_LOST);
		return;
	}
	a->netns = netns;
	a->tgid = task->tgid;
	a->parent = parent;
	bpf_ringbuf_submit(a, 0);
}

// The child is not running yet. Container managers make a namespace and then
// fork in it, to set the container up, long before its program is started.
SEC("tp_btf/sched_process_fork")
int BPF_PROG(weir_fork, struct task_struct *parent, struct task_struct *child)
{
	if (child->pid == child->tgid) // not a thread
		announce(child, parent->nsproxy->net_ns == child->nsproxy->net_ns ? parent->tgid : 0);
	return 0;
}

SEC("tp_btf/sched_process_exec")
int BPF_PROG(weir_exec, struct task_struct *task, int old_pid, struct linux_binprm *bprm)
{
	__u32 tgid = bpf_get_current_pid_tgid() >> 32, new = MODE_NEW;
	char name[2 * NAME_LEN] = {};
	__u8 *kind;

	// The name it was called by, e.g. of a link; then the file's, e.g. when
	// it was called as /proc/self/exe.
	bpf_get_current_comm(name, NAME_LEN);
	kind = bpf_map_lookup_elem(&weir_names, name);
	if (!kind) {
		__builtin_memset(name, 0, sizeof(name));
		bpf_probe_read_kernel_str(name, sizeof(name), bprm->file->f_path.dentry->d_name.name);
		kind = name[NAME_LEN - 1] ? 0 : bpf_map_lookup_elem(&weir_names, name);
		if (!kind) {
			forget(tgid);
			announce(task, 0); // it may have entered the namespace without a fork: unshare(1), nsenter(1)
			return 0;
		}
	}
	if (bpf_current_task_under_cgroup(&weir_subtree, 0) != 1) {
		forget(tgid);
		return 0;
	}
	if (*kind == NAME_GUEST)
		add_guest(tgid);
	else
		remove_guest(tgid);
	bpf_map_delete_elem(&weir_early, &tgid);
	bpf_map_update_elem(&weir_tracked, &tgid, &new, BPF_ANY);
	report(EVENT_EXEC, tgid, name);
	return 0;
}

SEC("tp_btf/sched_process_exit")
int BPF_PROG(weir_exit, struct task_struct *task)
{
	__u32 tgid = task->tgid;
	char none[NAME_LEN] = {};

	if (task->signal->live.counter) // not the last thread
		return 0;
	forget(tgid);
	if (!bpf_map_delete_elem(&weir_watched, &tgid))
		report(EVENT_GONE, tgid, none);
	/* The agent's files are closed after this: first connections, so that
	 * runtimes dial again, and then listeners and programs. What they dial
	 * goes direct. */
	if (task->tgid == agent_pid) {
		__u32 zero = 0;
		__u64 *beat = bpf_map_lookup_elem(&weir_heartbeat, &zero);

		if (beat)
			*beat = 0;
	}
	return 0;
}
