package config

import (
	"fmt"
	"strings"
)

func (d *decoder) coordination(c *Config) {
	p := c.Coordination.Prefix
	if len(p) < 2 || !strings.HasSuffix(p, "/") {
		d.report("coordination.prefix", "the default is /etcd-kms-proxy/", "%q does not end in a slash, or is nothing else", p)
		return
	}
	for i, r := range c.Rules {
		if strings.HasPrefix(r.Prefix, p) {
			d.report(fmt.Sprintf("rules[%d].prefix", i), "choose another coordination.prefix, or remove the rule", "%q is among the proxies' own keys, below %s", r.Prefix, p)
		}
	}
}
