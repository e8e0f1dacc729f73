package config

import (
	"fmt"
	"strings"
)

// defaultPrefix is where proxies find out what prefix others have.
const defaultPrefix = "/etcd-kms-proxy/"

func (v *validator) coordination(c *Config) {
	p := c.Coordination.Prefix
	if len(p) < 2 || !strings.HasSuffix(p, "/") {
		v.report("coordination.prefix", "the default is /etcd-kms-proxy/", "%q does not end in a slash, or is nothing else", p)
		return
	}
	for i, r := range c.Rules {
		at := fmt.Sprintf("rules[%d].prefix", i)
		switch {
		case strings.HasPrefix(r.Prefix, p):
			v.report(at, "choose another coordination.prefix, or remove the rule", "%q is among the proxies' own keys, below %s", r.Prefix, p)
		case strings.HasPrefix(r.Prefix, defaultPrefix):
			v.report(at, "remove the rule", "%q is among keys that are the proxies' own whatever coordination.prefix is, below %s", r.Prefix, defaultPrefix)
		}
	}
}
