package coordination

import (
	"context"
	"errors"
	"fmt"
	"strings"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// DefaultPrefix is the default of FleetConfig.Prefix. Below it, a proxy finds every record of
// rules, also those of proxies with another prefix:
//
//	/etcd-kms-proxy/agreement     the record of the proxies with this prefix
//	/etcd-kms-proxy/at/<prefix>   one key for each other prefix that has a record
const DefaultPrefix = "/etcd-kms-proxy/"

const pointers = DefaultPrefix + "at/"

// RecordLocation is a prefix below which there is a record of rules.
type RecordLocation struct {
	Prefix    string
	Agreement *Agreement // nil if it cannot be decoded
}

// OtherRecords returns the records below other prefixes than own.
func OtherRecords(ctx context.Context, kv clientv3.KV, own string, opts ...clientv3.OpOption) ([]RecordLocation, error) {
	pointed, err := kv.Get(ctx, pointers, append(opts, clientv3.WithPrefix(), clientv3.WithKeysOnly())...)
	if err != nil {
		return nil, fmt.Errorf("read where the proxies agreed on rules: %w", err)
	}
	prefixes := []string{DefaultPrefix}
	for _, p := range pointed.Kvs {
		prefixes = append(prefixes, strings.TrimPrefix(string(p.Key), pointers))
	}
	var places []RecordLocation
	for _, p := range prefixes {
		if p == own {
			continue
		}
		a, err := readAgreement(ctx, kv, p, opts...)
		switch {
		case errors.Is(err, ErrForged):
			places = append(places, RecordLocation{Prefix: p})
		case err != nil:
			return nil, err
		case a != nil:
			places = append(places, RecordLocation{p, a})
		}
	}
	return places, nil
}

// DeleteRecord removes a record, so that a proxy that was allowed to start without it is not
// refused again. Proxies that still use its prefix write it again.
func DeleteRecord(ctx context.Context, kv clientv3.KV, p RecordLocation) error {
	for _, key := range []string{agreementKey(p.Prefix), pointers + p.Prefix} {
		if _, err := kv.Delete(ctx, key); err != nil {
			return fmt.Errorf("remove the record of rules below %q: %w", p.Prefix, err)
		}
	}
	return nil
}

// writePointer writes the key below DefaultPrefix that leads to a record below another prefix.
func (f *Fleet) writePointer(ctx context.Context) error {
	key := pointers + f.cfg.Prefix
	if f.cfg.Prefix == DefaultPrefix {
		return nil
	}
	r, err := f.cfg.Client.Get(ctx, key, clientv3.WithCountOnly())
	if err == nil && r.Count == 0 {
		_, err = f.cfg.Client.Put(ctx, key, "")
	}
	if err != nil {
		return fmt.Errorf("note below %s where the rules are on record: %w", DefaultPrefix, err)
	}
	return nil
}

// deleteObsoleteRecords removes records from before the prefix was changed, which no proxy keeps up
// to date. A record is kept while proxies are announced below its prefix.
func (f *Fleet) deleteObsoleteRecords(ctx context.Context) error {
	places, err := OtherRecords(ctx, f.cfg.Client, f.cfg.Prefix)
	if err != nil {
		return err
	}
	for _, p := range places {
		there, err := f.cfg.Client.Get(ctx, p.Prefix+"proxies/", clientv3.WithPrefix(), clientv3.WithCountOnly())
		if err != nil {
			return fmt.Errorf("read which proxies there are: %w", err)
		}
		if there.Count > 0 {
			continue
		}
		if err := DeleteRecord(ctx, f.cfg.Client, p); err != nil {
			return err
		}
		f.cfg.Logger.Info("the rules are on record at one place again", "prefix", f.cfg.Prefix, "removed", p.Prefix)
	}
	return nil
}
