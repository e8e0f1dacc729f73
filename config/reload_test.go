package config

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestWeakens(t *testing.T) {
	sealed := Rule{Prefix: "/a/", WriteWith: "k", AllowPlaintextReads: true}
	strict := Rule{Prefix: "/a/", WriteWith: "k"}
	plain := Rule{Prefix: "/a/", WriteWith: Plaintext, AllowPlaintextReads: true}
	at := func(prefix string, r Rule) Rule { r.Prefix = prefix; return r }
	const removed = `keys below "/a/" would have no rule: their values were sealed with "k"`
	tests := map[string]struct {
		running, next []Rule
		want          []string
	}{
		"same":                {[]Rule{sealed}, []Rule{sealed}, nil},
		"first rule":          {nil, []Rule{sealed}, nil},
		"removed":             {[]Rule{sealed}, nil, []string{removed}},
		"plaintext removed":   {[]Rule{plain}, nil, nil},
		"to plaintext":        {[]Rule{sealed}, []Rule{plain}, []string{`keys below "/a/" would be written as plaintext: their values were sealed with "k"`}},
		"to sealed":           {[]Rule{plain}, []Rule{sealed}, nil},
		"to another provider": {[]Rule{sealed}, []Rule{{Prefix: "/a/", WriteWith: "l", ReadWith: []string{"k"}, AllowPlaintextReads: true}}, nil},
		"another key, old unreadable": {[]Rule{sealed}, []Rule{{Prefix: "/a/", WriteWith: "l", AllowPlaintextReads: true}},
			[]string{`keys below "/a/" would be sealed with "l": their values are sealed with "k", which is not in readWith`}},
		"narrowed":                    {[]Rule{sealed}, []Rule{at("/a/b/", sealed)}, []string{removed}},
		"widened":                     {[]Rule{sealed}, []Rule{at("/", sealed)}, nil},
		"widened, hole":               {[]Rule{sealed}, []Rule{at("/", sealed), plain}, []string{`keys below "/a/" would be written as plaintext: their values were sealed with "k"`}},
		"hole in it":                  {[]Rule{sealed}, []Rule{sealed, at("/a/b/", plain)}, []string{`keys below "/a/b/" would be written as plaintext: their values were sealed with "k"`}},
		"split":                       {[]Rule{at("", sealed)}, []Rule{at("", sealed), at("/a/", sealed)}, nil},
		"reads back on":               {[]Rule{strict}, []Rule{sealed}, []string{`keys below "/a/" would allow plaintext reads, which are refused now`}},
		"reads off":                   {[]Rule{sealed}, []Rule{strict}, nil},
		"reads back on in a hole":     {[]Rule{strict}, []Rule{strict, at("/a/b", sealed)}, []string{`keys below "/a/b" would allow plaintext reads, which are refused now`}},
		"strict removed below strict": {[]Rule{strict, at("/", strict)}, []Rule{at("/", strict)}, nil},
		"passthrough":                 {[]Rule{sealed}, []Rule{{Prefix: "/a/", WriteWith: "k", AllowPlaintextReads: true, OnUndecryptable: "passthrough"}}, nil},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			if diff := cmp.Diff(tt.want, Weakens(tt.running, tt.next)); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

func TestNeedsRestart(t *testing.T) {
	load := func() *Config {
		c, err := Load(write(t, minimal+kmsDev+"admin: {}\n"))
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	next := load()
	next.Rules = []Rule{{Prefix: "/", WriteWith: "dev"}}
	next.Log.Level = "debug"
	if got := NeedsRestart(load(), next); got != nil {
		t.Errorf("rules and log level need %v", got)
	}
	next.Listeners[0].Mode = "0660"
	next.Etcd.MaxRequestBytes++
	next.KMS[0].Plugin.Timeout = time.Minute
	next.Cache.Seeds++
	next.Admin = nil
	next.Audit = &Audit{}
	next.Log.Format = "text"
	want := []string{"listeners", "etcd", "kms", "cache", "admin", "audit", "log.format"}
	if diff := cmp.Diff(want, NeedsRestart(load(), next)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}
