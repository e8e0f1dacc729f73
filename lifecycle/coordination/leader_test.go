package coordination

import (
	"testing"
	"testing/synctest"
	"time"
)

func TestLeader(t *testing.T) {
	both, none := []string{"scan", "reencrypt"}, []string{}
	for name, c := range map[string]struct {
		members         []Member
		scan, reencrypt string
	}{
		"nobody":                {},
		"the oldest":            {[]Member{{ID: "a", Jobs: both}, {ID: "b", Jobs: both}}, "a", "a"},
		"those that have it":    {[]Member{{ID: "a", Jobs: none}, {ID: "b", Jobs: []string{"scan"}}, {ID: "c", Jobs: both}}, "b", "c"},
		"no one has it":         {[]Member{{ID: "a", Jobs: none}, {ID: "b", Jobs: none}}, "", ""},
		"an old version, first": {[]Member{{ID: "a"}, {ID: "b", Jobs: both}}, "a", "a"},
		// An old version does a job only as the first of all.
		"an old version, later": {[]Member{{ID: "a", Jobs: none}, {ID: "b"}, {ID: "c", Jobs: both}}, "c", "c"},
	} {
		if scan, reencrypt := leader(c.members, "scan"), leader(c.members, "reencrypt"); scan != c.scan || reencrypt != c.reencrypt {
			t.Errorf("%s: scan %q, reencrypt %q", name, scan, reencrypt)
		}
	}
}

// TestLeaderHasTheJob checks that proxies elect one that has a job, also if the oldest has none,
// and that a job ends with the announcement.
func TestLeaderHasTheJob(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := newFleetSimulation(t)
		defer s.stop()
		without := s.startWith(Member{ID: "without"}, "old")
		time.Sleep(time.Minute)
		with := s.startWith(Member{ID: "with", Jobs: []string{"work"}}, "old")
		time.Sleep(time.Minute)
		if without.Leads("work") || !with.Leads("work") || with.Leads("other") {
			t.Errorf("without the job: %t, with it: %t, another job: %t", without.Leads("work"), with.Leads("work"), with.Leads("other"))
		}
		members, err := with.Members(t.Context())
		if err != nil || len(members) != 2 || members[0].Jobs == nil {
			t.Errorf("a proxy without jobs is announced like one of an old version: %+v, %v", members, err)
		}
		s.stops["with"]()
		if with.Leads("work") {
			t.Error("a proxy that ended leads")
		}
	})
}
