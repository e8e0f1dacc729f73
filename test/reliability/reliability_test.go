// Package reliability makes everything fail that can fail around two proxies and an etcd of three
// members, under load, and counts what that did to the data: it must do nothing.
//
// Clients write and read through both proxies, with every value under a rule. Meanwhile processes
// are killed and frozen, networks cut, disks filled, clocks moved; etcd is upgraded and downgraded,
// its members are replaced, and a snapshot is restored. Afterwards, the test checks that no write
// is lost or was applied twice, that every value that a client read was one that it could read
// (porcupine), that watches got every event once, and that no plaintext is in any file, log,
// metric, core dump, or in the traffic behind the proxies.
//
// RELIABILITY is the duration, as Go writes durations. Without it, the test takes some minutes, and
// with -short less than one. RELIABILITY_FAULTS is a regular expression for the names of the faults
// to make, and RELIABILITY_CHANGES=none leaves out the changes. RELIABILITY_RESULTS is a file for
// the figures as JSON, and RELIABILITY_PAGE a page whose end is replaced by the tables.
package reliability

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

// within is how long anything may take to work again after a fault.
const within = 90 * time.Second

// first is the version of etcd at the start and at the end.
const first = "3.5"

// change is something that operators do to the cluster. Each takes place under load, unless it is
// quiet.
type change struct {
	name  string
	quiet bool
	do    func(s *site, settled func(name string))
}

var changes = []change{
	{name: "etcd upgraded from 3.5 to 3.6", do: upgrade("3.6")},
	{name: "etcd upgraded from 3.6 to 3.7", do: upgrade("3.7")},
	{name: "all members of etcd replaced, one after the other", do: replace},
	{name: "a snapshot restored under running proxies", quiet: true, do: restore},
	{name: "etcd downgraded from 3.7 to 3.6", do: downgrade("3.6")},
	{name: "etcd downgraded from 3.6 to 3.5", do: downgrade("3.5")},
}

func TestReliability(t *testing.T) {
	length, changing := time.Minute, !testing.Short()
	if testing.Short() {
		length = 20 * time.Second
	}
	if text := os.Getenv("RELIABILITY"); text != "" {
		var err error
		if length, err = time.ParseDuration(text); err != nil {
			t.Fatalf("RELIABILITY: %v", err)
		}
		changing = os.Getenv("RELIABILITY_CHANGES") != "none"
	}
	s := newSite(t, os.Getenv("RELIABILITY") != "")
	s.only = regexp.MustCompile(os.Getenv("RELIABILITY_FAULTS"))
	end := s.report.Started.Add(length)
	for round := 1; ; round++ {
		if !changing {
			s.period("faults", func(settled func(string)) { s.fail(end, settled) })
			break
		}
		// Between two changes, each version of etcd gets its share of the faults.
		for n, c := range changes {
			until := time.Now().Add(min(length/time.Duration(len(changes)), max(5*time.Second, time.Until(end)/time.Duration(len(changes)-n))))
			if round > 1 {
				until = time.Now().Add(length / time.Duration(len(changes)))
			}
			s.period("faults", func(settled func(string)) { s.fail(until, settled) })
			if c.quiet {
				c.do(s, func(string) {})
			} else {
				s.period(c.name, func(settled func(string)) { c.do(s, settled) })
			}
			s.report.count(c.name, 0)
		}
		if !time.Now().Before(end) {
			break
		}
	}
	s.finish()
}

// period runs clients while work is done, and checks afterwards what they saw. work calls settled
// after each fault: it waits until every client gets responses again.
func (s *site) period(name string, work func(settled func(name string))) {
	s.t.Helper()
	s.periods++
	l := newLoad(s, fmt.Sprintf("%s%d/", prefix, s.periods))
	s.load = l
	ctx, cancel := context.WithCancel(s.t.Context())
	defer cancel()
	l.start(ctx)
	settled := func(fault string) {
		s.t.Helper()
		begun := time.Now()
		l.proceed(fault)
		s.report.count(fault, time.Since(begun))
	}
	l.proceed("the start of a period")
	work(settled)
	s.t.Logf("%s: %s", name, l.check(cancel))
	s.load = nil
	if s.t.Failed() {
		s.t.FailNow() // the first failure is the one to look at
	}
}

// fail makes one thing fail after the other, until the time is over; every fourth time, a network
// fails too.
func (s *site) fail(until time.Time, settled func(string)) {
	s.t.Helper()
	var all, fresh []fault // fresh: not made yet
	networks := 0
	for _, f := range faults {
		if !s.only.MatchString(f.name) {
			continue
		}
		if f.needs != nil && f.needs(s) != "" {
			s.report.skip(f.name, f.needs(s))
			continue
		}
		for range max(1, f.weight) {
			all = append(all, f)
		}
		if s.report.times(f.name) == 0 {
			fresh = append(fresh, f)
		}
		if f.network {
			networks++
		}
	}
	for n := 0; time.Now().Before(until); n++ {
		f := all[rand.IntN(len(all))]
		if len(fresh) > 0 { // first each of them once, in any order
			i := rand.IntN(len(fresh))
			f = fresh[i]
			fresh = slices.Delete(fresh, i, i+1)
		}
		names, heals := []string{f.name}, []func(){f.begin(s)}
		if n%4 == 3 && !f.network && networks > 0 {
			second := all[rand.IntN(len(all))]
			for !second.network {
				second = all[rand.IntN(len(all))]
			}
			names, heals = append(names, second.name), append(heals, second.begin(s))
		}
		f.hold()
		for i := len(heals) - 1; i >= 0; i-- { // the network first: the other one may need it
			heals[i]()
		}
		settled(names[0])
		for _, name := range names[1:] {
			s.report.count(name, 0)
		}
		if n%20 == 0 {
			for _, p := range s.proxies {
				p.Scrape()
			}
		}
	}
}

// upgrade restarts one member after the other with another version.
func upgrade(version string) func(*site, func(string)) {
	return func(s *site, settled func(string)) {
		s.t.Helper()
		for _, m := range s.cluster.Members {
			if !m.Stop(within) {
				s.t.Errorf("a member does not end")
			}
			m.Version = version
			m.Start()
			settled("a member of etcd restarted with another version")
		}
		s.agreed(version)
		s.advance(2 * snapshotCount) // so that a snapshot of this version replaces the log of the last one
	}
}

func downgrade(version string) func(*site, func(string)) {
	return func(s *site, settled func(string)) {
		s.t.Helper()
		s.cluster.Downgrade(version)
		upgrade(version)(s, settled)
	}
}

func replace(s *site, settled func(string)) {
	s.t.Helper()
	for n := range s.cluster.Members {
		s.cluster.Replace(n)
		settled("a member of etcd replaced by a new one")
	}
}

// restore writes, saves a snapshot, writes more, and restores the snapshot. The proxies keep
// running: both must serve what is in the snapshot, and nothing else.
func restore(s *site, _ func(string)) {
	s.t.Helper()
	const keys = 200
	base := fmt.Sprintf("%srestored-%d/", prefix, s.periods)
	name := func(kind string, n int) string { return fmt.Sprintf("%s%s-%03d", base, kind, n) }
	want := make(map[string]string)
	for n := range keys {
		want[name("old", n)] = s.Sealed.Value(fmt.Sprintf("old %d", n))
		s.write(n, name("old", n), want[name("old", n)])
	}
	snapshot := s.cluster.Snapshot(rand.IntN(3), fmt.Sprintf("snapshot-%d.db", s.periods))
	for n := range keys {
		s.write(n, name("new", n), s.Sealed.Value(fmt.Sprintf("new %d", n)))
		if n%2 == 0 {
			s.write(n, name("old", n), s.Sealed.Value(fmt.Sprintf("changed %d", n)))
		}
	}
	s.cluster.Restore(snapshot)
	begun := time.Now()
	for n := range s.proxies {
		got := s.list(n, base)
		for key, value := range want {
			switch have, ok := got[key]; {
			case !ok:
				s.report.lost(key + " is not there after the restore")
			case have.value != value:
				s.report.wrong(key + " has a value that is not of the snapshot")
			}
			delete(got, key)
		}
		for key := range got {
			s.report.wrong(key + " is there, and not in the snapshot")
		}
	}
	s.report.recovered("a snapshot restored under running proxies", time.Since(begun))
	s.report.Operations += 2*keys + keys/2 + 2*keys
	s.delete(base)
	s.agreed(s.cluster.Members[0].Version)
}

// agreed waits until etcd's members have one version, and both proxies are ready.
func (s *site) agreed(version string) {
	s.t.Helper()
	for _, m := range s.cluster.Members {
		harness.Eventually(s.t, within, "the members to agree on "+version, func() error {
			body, err := fetch(m.URL + "/version")
			if err == nil && !strings.Contains(body, `"etcdcluster":"`+version+`.`) {
				err = fmt.Errorf("%s says %s", m.URL, body)
			}
			return err
		})
	}
	for _, p := range s.proxies {
		p.WaitReady(within)
	}
}
